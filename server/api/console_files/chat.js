// A small chat to try the model, as a tenant would: with a tenant's key, over the public API, streaming.

import {tenantCall} from "./calls.js";
import {$, el, say} from "./dom.js";
import {duration} from "./format.js";

// What the server says about an answer in its head, in words.
const TOLD = [
  ["x-queue-position", (value) => (value === "0" ? null : `was number ${value} in the queue`)],
  ["x-queue-wait", (value) => (Number(value) < 0.0015 ? null : `waited ${duration(Number(value))}`)],
  ["x-context-truncated", (value) => `history shortened: ${value}`],
  ["x-degradation-level", (value) => `level ${value}`],
  ["x-degradation-applied", (value) => `applied: ${value}`],
  ["x-ratelimit-mode", (value) => `limits: ${value}`],
];

let messages = [];
let running = null;

export function chat() {
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("chat-settings").addEventListener("submit", (event) => event.preventDefault());
  $("chat-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  });
  $("chat-stop").addEventListener("click", () => running?.abort());
  $("chat-key").addEventListener("change", listModels);
  $("chat-new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    $("chat-log").replaceChildren();
  });
}

// Fill the list of models with those that the key may use.
export async function listModels() {
  const kept = $("chat-model").value;
  try {
    const listed = await (await tenantCall("models", {key: key()})).json();
    $("chat-model").replaceChildren(...listed.data.map((card) => el("option", {value: card.id}, card.id)));
    if (listed.data.some((card) => card.id === kept)) $("chat-model").value = kept;
    if (!messages.length) $("chat-log").replaceChildren();
  } catch (error) {
    $("chat-model").replaceChildren();
    note("error", error.message);
  }
}

const key = () => $("chat-key").value.trim();

async function ask() {
  const text = $("chat-text").value.trim();
  if (!text || running) return;
  $("chat-text").value = "";
  bubble("user", text);
  messages.push({role: "user", content: text});
  busy(running = new AbortController());
  const answer = bubble("assistant", "");
  const about = el("p", {class: "about", role: "status"}, "waiting…");
  following(() => answer.after(about));
  try {
    await stream(answer, about);
  } catch (error) {
    if (error.name === "AbortError") say(about, "stopped");
    else note("error", error.message);
  } finally {
    if (answer.textContent) messages.push({role: "assistant", content: answer.textContent});
    else answer.remove();
    if (about.textContent === "waiting…") about.remove();
    busy(running = null);
    $("chat-text").focus();
  }
}

async function stream(answer, about) {
  const started = performance.now();
  const body = {model: $("chat-model").value || undefined, messages, stream: true, stream_options: {include_usage: true}};
  if ($("chat-max").value) body.max_tokens = Number($("chat-max").value);
  const reply = await tenantCall("chat/completions", {key: key(), body, signal: running.signal});
  const told = TOLD.map(([name, words]) => [reply.headers.get(name), words]).filter(([value]) => value !== null)
    .map(([value, words]) => words(value)).filter(Boolean);
  let first = null;
  let usage = null;
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const delta = event.choices?.[0]?.delta ?? {};
    const words = delta.content ?? delta.reasoning_content ?? delta.reasoning ?? "";
    if (!words) continue;
    first ??= (performance.now() - started) / 1000;
    following(() => {
      answer.append(words);
      say(about, [`first word after ${duration(first)}`, ...told].join(" · "));
    });
  }
  const seconds = (performance.now() - started) / 1000;
  const counted = usage ? [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`] : [];
  following(() => say(about, [first === null ? "an empty answer" : `first word after ${duration(first)}`,
    `${duration(seconds)} in all`, ...counted, ...told].join(" · ")));
}

// The JSON objects of a stream of server-sent events. Comments keep a waiting stream alive and say nothing.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}

// Change the conversation, and stay at its end if that is where the reader is.
function following(change) {
  const log = $("chat-log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function bubble(role, text) {
  const node = el("p", {class: `bubble ${role}`}, text);
  $("chat-log").append(node);
  node.scrollIntoView({block: "end"});
  return node;
}

function note(kind, text) {
  const node = el("p", {class: kind, role: "alert"}, text);
  $("chat-log").append(node);
  node.scrollIntoView({block: "end"});
}

function busy(now) {
  $("chat-send").hidden = Boolean(now);
  $("chat-stop").hidden = !now;
}
