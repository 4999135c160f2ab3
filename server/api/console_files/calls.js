// Calls to the server. Addresses are relative to the page, so the console works behind any prefix.

const KEPT = "tidegate.operator-key";

export const keptKey = () => sessionStorage.getItem(KEPT);
export const keepKey = (key) => sessionStorage.setItem(KEPT, key);
export const forgetKey = () => sessionStorage.removeItem(KEPT);

// A refusal, with the server's own words. `status` 0: nothing answers.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function operatorCall(method, path, body) {
  const headers = {authorization: `Bearer ${keptKey()}`};
  if (body) headers["content-type"] = "application/json";
  const answer = await send(`../admin/${path}`, {method, headers, body: body && JSON.stringify(body), cache: "no-store"});
  return answer.json();
}

// A call with a tenant's key, if there is one.
export function tenantCall(path, {key, body, signal} = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  return send(`../v1/${path}`, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal});
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, {...options, credentials: "omit", redirect: "error"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (!answer.ok) throw new Refused(answer.status, await words(answer));
  return answer;
}

async function words(answer) {
  try {
    const body = await answer.json();
    return String(body.error.message);
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}
