// The server's HTTP API: requests, streams, and errors as one readable line.

const KEY = "rag2.token";

/** A request that failed; `message` is for people, `status` 0 where nothing answered. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The token of this tab; kept until the tab is closed. */
export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** Take the token out of the address, where it would be seen and shared. */
export function takeToken() {
  const found = location.hash.match(/^#token=(.+)/);
  if (!found) return;
  try {
    token.set(decodeURIComponent(found[1]));
  } catch {
    token.set(found[1]); // a percent sign of its own
  }
  history.replaceState(null, "", location.pathname + location.search);
}

/** The response to a request; throws Failure, or AbortError where `signal` says so. */
export async function request(method, path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  // Only changes need the token.
  const changes = method === "DELETE" || (method === "POST" && path.startsWith("/v1/documents"));
  if (changes && token.get()) headers.Authorization = `Bearer ${token.get()}`;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server does not answer. Is it running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** The object that a request returns. */
export const json = async (...parts) => (await request(...parts)).json();

/** The address of a document, or of all where it has no id. */
export function documents(id, query = {}) {
  const search = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  return `/v1/documents${id ? "/" + encodeURIComponent(id) : ""}${search.size ? "?" + search : ""}`;
}

/** The objects of a stream of server-sent events, up to [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read().catch(lost);
    if (done) lost(new TypeError());
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(0, event.error.message);
      yield event;
    }
  }
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new Failure(0, "The connection ended before the answer did.");
}

async function failure(response) {
  const said = await response.json().then((body) => body.error.message, () => response.statusText);
  const wait = response.headers.get("Retry-After");
  const lines = {
    401: `The server wants its token: ${said}`,
    429: `The server is busy. Ask again in ${wait ?? "a few"} s.`,
    503: `The server is not ready. ${said}`,
  };
  return new Failure(response.status, lines[response.status] ?? said);
}
