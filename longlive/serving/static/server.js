// Whether the server can begin a session, and what its model is.

import { address } from "./access.js";

export const POLL_INTERVAL = 700; // milliseconds between requests to a server that is not ready

export const delay = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * `{ obstacle, model }`: why a session cannot start yet, in words, or null and the description of the model. `watching`: it is somebody
 * else's session, which describes its model itself.
 */
export async function ask(watching) {
  try {
    return await asked(watching);
  } catch {
    return { obstacle: { title: "The server does not answer", text: "The page keeps trying. Is the server running?" } };
  }
}

async function asked(watching) {
  const health = await fetch(address("/health"));
  if (!health.ok) {
    const { detail } = await health.json().catch(() => ({}));
    if (detail && detail !== "loading") return { obstacle: { state: "error", title: "The server cannot make videos", text: detail } };
    return { obstacle: { title: "Loading the model", text: "This takes a moment after the server has started." } };
  }
  if (watching) return { obstacle: null }; // who has only a link has no token
  const models = await fetch(address("/models"));
  if (models.status === 401) {
    const { detail } = await models.json();
    const text = "Open the address that the server printed when it started last; the token is part of it.";
    return { obstacle: { state: "error", title: detail.includes("missing") ? "The token is missing" : "The token is wrong", text } };
  }
  const [model] = await models.json();
  return { obstacle: null, model };
}
