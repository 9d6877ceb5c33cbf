// Splits a buffer into the JPEG files that it holds one after the other.

const MARKER = 0xff;
const START_OF_SCAN = 0xda;
const END_OF_IMAGE = 0xd9;

/** Views of the files in `buffer`, in order. Throws RangeError when the last one is incomplete. */
export function splitJpegs(buffer) {
  const bytes = new Uint8Array(buffer);
  const files = [];
  for (let start = 0; start < bytes.length; ) {
    const end = endOfFile(bytes, start);
    files.push(bytes.subarray(start, end));
    start = end;
  }
  return files;
}

// Follows the lengths of the markers' segments: the two bytes that end a file may also occur inside a table.
function endOfFile(bytes, start) {
  let at = start + 2;
  while (at + 1 < bytes.length) {
    const kind = bytes[at + 1];
    if (kind === END_OF_IMAGE) return at + 2;
    at += 2 + bytes[at + 2] * 256 + bytes[at + 3];
    if (kind === START_OF_SCAN) at = endOfScan(bytes, at);
  }
  throw new RangeError("a JPEG file is incomplete");
}

// In entropy-coded data FF is followed by 00, or by D0 to D7 for a restart marker.
function endOfScan(bytes, at) {
  while (at < bytes.length && !(bytes[at] === MARKER && bytes[at + 1] !== 0 && (bytes[at + 1] & 0xf8) !== 0xd0)) at += 1;
  return at;
}
