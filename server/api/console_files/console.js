// The console: signs in, asks for a snapshot every second and a half while somebody looks, and draws it.

import {forgetKey, keepKey, keptKey, operatorCall, Refused} from "./calls.js";
import {chat, listModels} from "./chat.js";
import {$, say, sayOrHide} from "./dom.js";
import {figuresBetween} from "./figures.js";
import {time} from "./format.js";
import {levelSwitch, named} from "./level.js";
import {tabs} from "./tabs.js";
import {buildCharts, drawCharts, drawSnapshot, WINDOW_S} from "./view.js";

const INTERVAL_MS = 1500;
const LONGEST_PAUSE_MS = 30000;
const QUANTILES_OVER_S = 10;
const UNAUTHORIZED = 401;

let snapshots = [];
let history = [];
let timer = null;
let paused = false;
let asking = false;
let failures = 0;
let failingSince = null;
let told = "";

function start() {
  buildCharts();
  tabs(document.querySelector("[role=tablist]"), (id) => {
    if (id === "tab-now") drawCharts(history);
    if (id === "tab-chat" && !$("chat-model").value) listModels();
  });
  levelSwitch(() => poll());
  chat();
  theme();
  $("key-form").addEventListener("submit", signIn);
  $("sign-out").addEventListener("click", () => signOut(""));
  $("pause").addEventListener("click", () => setPaused(!paused));
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : keptKey() && poll()));
  if (keptKey()) open();
  else ask("");
}

function ask(problem) {
  $("sign-in").hidden = false;
  $("console").hidden = true;
  for (const id of ["pills", "meta", "pause", "sign-out"]) $(id).hidden = true;
  sayOrHide($("key-error"), problem);
  $("key").setAttribute("aria-invalid", String(Boolean(problem)));
  $("key").focus();
}

async function signIn(event) {
  event.preventDefault();
  keepKey($("key").value.trim());
  try {
    await operatorCall("GET", "overview");
  } catch (error) {
    forgetKey();
    ask(error.status === UNAUTHORIZED ? "The server does not take this key." : error.message);
    return;
  }
  $("key").value = "";
  open();
}

function signOut(problem) {
  clearTimeout(timer);
  forgetKey();
  [snapshots, history, failures] = [[], [], 0];
  sayOrHide($("banner"), "");
  ask(problem);
}

function open() {
  $("sign-in").hidden = true;
  for (const id of ["console", "pills", "meta", "pause", "sign-out"]) $(id).hidden = false;
  setPaused(false);
}

function setPaused(now) {
  paused = now;
  $("pause").setAttribute("aria-pressed", String(paused));
  say($("pause"), paused ? "Go on" : "Pause");
  if (paused) clearTimeout(timer);
  else poll();
}

// One snapshot, and the next one later. Nobody asks while nobody looks.
async function poll() {
  clearTimeout(timer);
  if (asking || !keptKey()) return;
  asking = true;
  try {
    take(await operatorCall("GET", "overview"));
    [failures, failingSince] = [0, null];
    sayOrHide($("banner"), "");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === UNAUTHORIZED) {
      signOut("The server does not take this key any more.");
      return;
    }
    failures += 1;
    failingSince ??= Date.now() / 1000;
    sayOrHide($("banner"), `${error.message} The figures below are those of ${time(failingSince)}.`);
  } finally {
    asking = false;
    if (!paused && !document.hidden && keptKey()) {
      timer = setTimeout(poll, Math.min(INTERVAL_MS * 2 ** failures, LONGEST_PAUSE_MS));
    }
  }
}

function take(snapshot) {
  const last = snapshots[snapshots.length - 1];
  const figures = last ? figuresBetween(last, snapshot, snapshots[0]) : null;
  if (figures) history.push(figures);
  history = history.filter((point) => point.at > snapshot.taken_at_s - WINDOW_S);
  snapshots = [...snapshots.filter((one) => one.taken_at_s > snapshot.taken_at_s - QUANTILES_OVER_S), snapshot];
  drawSnapshot(snapshot, figures);
  drawCharts(history);
  tell(snapshot);
}

// What a screen reader is told: changes of state, and not every figure.
function tell(s) {
  const state = `${s.engine.ready ? "The engine is ready" : s.engine.stage}. Level ${s.level.level}, ${named(s.level.name)}.`;
  document.title = `${s.engine.ready ? "" : "! "}${s.level.level ? `L${s.level.level} · ` : ""}Tidegate console`;
  if (told !== state) say($("announce"), told = state);
}

function theme() {
  const choice = $("theme");
  choice.value = localStorage.getItem("tidegate.theme") ?? "auto";
  choice.addEventListener("change", () => {
    localStorage.setItem("tidegate.theme", choice.value);
    if (choice.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice.value;
  });
}

start();
