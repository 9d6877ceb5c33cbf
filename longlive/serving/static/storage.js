// Values that this tab keeps when it is reloaded. Where the browser forbids storage, nothing is kept and everything else works.

const PREFIX = "longlive.";

export function recall(key) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + key));
  } catch {
    return null;
  }
}

export function remember(key, value) {
  try {
    sessionStorage.setItem(PREFIX + key, JSON.stringify(value));
  } catch {
    // forbidden, or full
  }
}

export function forget(key) {
  try {
    sessionStorage.removeItem(PREFIX + key);
  } catch {
    // forbidden
  }
}
