// What the page says about a session's state and its end.

/** The state of a session in words. `position`: in the queue. */
export function words(state, { watching, ownerPaused, pending, ended }, position) {
  switch (state) {
    case "connecting":
      return "Connecting";
    case "reconnecting":
      return "Connection lost, reconnecting";
    case "queued":
      return position === 1 ? "In the queue: you are next" : `In the queue: position ${position}`;
    case "paused":
      return ownerPaused ? "Paused by its owner" : "Paused";
    case "switching":
      return pending.words;
    case "generating":
      return watching ? "Watching" : "Generating";
    default:
      return ended.title;
  }
}

export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const TRIED = "The page tried for half a minute. Is the server running?";
export const NO_ANSWER = { state: "error", title: "The server does not answer", text: TRIED, serverGone: true };
export const ENDED = { state: "ended", title: "The session has ended", text: "You can still download its recording and its timeline." };
export const GONE = { state: "ended", title: "The session has ended", text: "The server no longer has it. Start another one." };
export const STOPPED = { state: "ended", title: "The server has stopped", text: "The recording and the timeline are kept.", serverGone: true };
