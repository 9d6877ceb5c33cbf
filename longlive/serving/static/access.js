// URLs on the server, with the token from the address of the page.

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

export function socketAddress(path) {
  const url = address(path);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  return url;
}
