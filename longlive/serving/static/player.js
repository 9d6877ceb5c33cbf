// The two players: which of them the browser can use, and their common interface.
//
// A player has `header(message, bytes)`, `push(segment, parts)`, `play()`, `pause()`, `close()`. It keeps what it has shown for some
// minutes: `seek(time)` looks back, while the clock of the newest images, at which `goLive()` returns to them, goes on; `span` is
// `{ time, start, end }`, the time on screen and the first and last that can be shown (null: none); `lookingBack` is true or false.
// It calls `events`: `appended(segment, buffered, end)` when a segment can be played, with the seconds left to play and the time of its
// end; `shown(segment, time, at)` for the image on screen, `time` in seconds of the video, `at` on the clock of `performance.now()`;
// `blocked()` when the browser plays only after a click; `failed(reason)` when it cannot go on.

import { JpegPlayer } from "./player_jpeg.js";
import { Mp4Player, canPlayMp4 } from "./player_mp4.js";

export function bestFormat(wanted) {
  return wanted !== "jpeg" && canPlayMp4() ? "mp4" : "jpeg";
}

/** `begin`: seconds of the video that were shown before the page was reloaded. */
export function createPlayer(format, { video, canvas }, events, begin) {
  video.hidden = format !== "mp4";
  canvas.hidden = format !== "jpeg";
  return format === "mp4" ? new Mp4Player(video, events) : new JpegPlayer(canvas, events, begin);
}
