// URLs on the server, with the token from the address of the page; and the link with which others can watch.

import { recall, remember } from "./storage.js";

const page = new URL(location.href);
if (page.searchParams.has("token")) {
  remember("token", page.searchParams.get("token"));
  page.searchParams.delete("token"); // otherwise it would stay in the history, in bookmarks and in screenshots
  history.replaceState(null, "", page);
}
const token = recall("token");

export const parameters = page.searchParams;

export function address(path) {
  const url = new URL(path, location.origin);
  if (token !== null) url.searchParams.set("token", token);
  return url;
}

/** The session that this page may only watch, `{ session, key }`; null: none. After the #, so that no server is told of it. */
export function watched() {
  const hash = new URLSearchParams(location.hash.slice(1));
  return hash.has("watch") ? { session: hash.get("watch"), key: hash.get("key") } : null;
}

/** The address with which others watch a session. It has the session's key for that, and not the server's token. */
export function watchAddress({ session, key }) {
  const url = new URL("/", location.origin);
  url.hash = new URLSearchParams({ watch: session, key });
  return url;
}

/** `access`: the session and one of its keys, which stand for the token. */
export function socketAddress(path, access) {
  const url = address(path);
  for (const [name, value] of Object.entries(access)) url.searchParams.set(name, value);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  return url;
}
