// Where two texts part, and how a text falls into paragraphs and code. Knows no page.

// How many UTF-16 units two texts share from their start; a character is never cut in two.
export function commonLength(a, b) {
  const most = Math.min(a.length, b.length);
  let at = 0;
  while (at < most && a.charCodeAt(at) === b.charCodeAt(at)) at += 1;
  const last = a.charCodeAt(at - 1);
  return at > 0 && at < Math.max(a.length, b.length) && last >= 0xd800 && last < 0xdc00 ? at - 1 : at;
}

// Compares two answers { text, ended }, of which `ended` says that the model wants to say no more. `parted`: a letter
// differs, or one ended and the other goes on; `endedFirst` is then which one.
export function compare(left, right) {
  const at = commonLength(left.text, right.text);
  const stops = (one, other) => one.ended && at === one.text.length && at < other.text.length;
  const endedFirst = stops(left, right) ? 0 : stops(right, left) ? 1 : null;
  const differs = at < left.text.length && at < right.text.length;
  return { at, endedFirst, parted: differs || endedFirst !== null };
}

export function countCharacters(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

const OPENING = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const CLOSING = /^ {0,3}(`{3,}|~{3,})\s*$/;

// The parts of a text that are shown, in order: { code, start, end }. Blank lines and the fences of code are left out.
export function blocks(text) {
  const found = [];
  let open = null, fence = null, at = 0;
  const close = (end) => {
    if (open) found.push({ ...open, end: Math.max(open.start, end) });
    open = null;
  };
  for (const line of text.split("\n")) {
    const next = at + line.length + 1;
    const mark = (fence ? CLOSING : OPENING).exec(line)?.[1];
    if (fence ? mark?.startsWith(fence) : mark) {
      close(at - 1);
      fence = fence ? null : mark;
      if (fence) open = { code: true, start: Math.min(next, text.length) };
    } else if (!fence && line.trim() === "") {
      close(at - 1);
    } else {
      open ??= { code: false, start: at };
    }
    at = next;
  }
  close(text.length);
  return found;
}
