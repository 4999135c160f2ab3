// Draws one snapshot, and the figures between it and the one before.

import {Chart} from "./chart.js";
import {$, facts, say, table} from "./dom.js";
import {compact, count, duration, none, percent, rate, span, time} from "./format.js";
import {named, showLevel} from "./level.js";

export const WINDOW_S = 300;

const seconds = {format: duration, axis: (v) => (v === 0 ? "0" : duration(v))};
const rates = {format: rate, axis: compact};
const CHARTS = [
  {title: "Throughput", unit: "tokens per second", ...rates, series: [
    {name: "Generated", of: (f) => f.completionTokens}, {name: "Read", of: (f) => f.promptTokens}]},
  {title: "Time to first token", unit: "from arrival", ...seconds, series: [
    {name: "Median", of: (f) => f.ttft.p50}, {name: "95th percentile", of: (f) => f.ttft.p95}]},
  {title: "Wait in the queue", unit: "before the engine", ...seconds, series: [
    {name: "Median", of: (f) => f.queueWait.p50}, {name: "95th percentile", of: (f) => f.queueWait.p95}]},
  {title: "Requests", unit: "at this moment", ...rates, axis: compact, format: count, series: [
    {name: "Running", of: (f) => f.running}, {name: "Waiting", of: (f) => f.waiting}]},
  {title: "KV cache", unit: "share of its tokens", format: percent, axis: percent, most: 1, lines: 4, series: [
    {name: "Reserved", of: (f) => f.kvReserved}, {name: "In use", of: (f) => f.kvUsed}]},
  {title: "Answers", unit: "per second", ...rates, series: [
    {name: "Good", of: (f) => f.answered}, {name: "Refused (4xx)", of: (f) => f.refused},
    {name: "Full or failed (5xx)", of: (f) => f.failed}]},
];

let charts = [];

export function buildCharts() {
  charts = CHARTS.map((spec) => new Chart(spec, WINDOW_S));
  $("charts").replaceChildren(...charts.map((chart) => chart.node));
}

export function drawCharts(history) {
  for (const chart of charts) chart.show(history);
}

export function drawSnapshot(snapshot, figures) {
  drawHead(snapshot);
  drawTiles(snapshot, figures);
  showLevel(snapshot.level);
  drawHealth(snapshot);
  drawTenants(snapshot.tenants);
  drawBatches(snapshot.batches, snapshot.taken_at_s);
  drawRecent("refusals", snapshot.recent.refusals, "Nothing was refused since the server started.");
  drawRecent("truncations", snapshot.recent.truncations, "Nothing was shortened since the server started.");
}

function drawHead(s) {
  const engine = $("pill-engine");
  say(engine, s.engine.ready ? "ready" : s.engine.stage);
  engine.className = `pill ${s.engine.ready ? "good" : "bad"}`;
  const level = $("pill-level");
  say(level, `level ${s.level.level} · ${named(s.level.name)}${s.level.pin ? " · held" : ""}`);
  level.className = `pill ${s.level.level === 0 ? "good" : s.level.level < 4 ? "warn" : "bad"}`;
  const limits = $("pill-limits");
  say(limits, s.limits.mode === "redis" ? "limits in Redis" : "limits here only: Redis is away");
  limits.className = `pill ${s.limits.mode === "redis" ? "plain" : "warn"}`;
  say($("meta"), [s.engine.models[0], `Tidegate ${s.versions.tidegate}`, `vLLM ${s.versions.vllm ?? none}`,
    `up ${span(s.uptime_s)}`].filter(Boolean).join(" · "));
}

function drawTiles(s, f) {
  const total = (byClass) => Object.values(byClass).reduce((a, b) => a + b, 0);
  const cap = s.requests.running_cap;
  const tiles = [
    ["Generated", rate(f?.completionTokens), "tokens/s"],
    ["Read", rate(f?.promptTokens), "tokens/s"],
    ["Requests", rate(f ? f.answered + f.refused + f.failed : null), "per second"],
    ["First token", duration(f?.ttft.p50), `95 %: ${duration(f?.ttft.p95)}`],
    ["Between tokens", duration(f?.itl.p50), `95 %: ${duration(f?.itl.p95)}`],
    ["Running", count(total(s.requests.running)), cap ? `of about ${cap}` : ""],
    ["Waiting", count(total(s.requests.waiting)), classes(s.requests.waiting)],
    ["KV cache", percent(s.kv.capacity_tokens ? s.kv.used_tokens / s.kv.capacity_tokens : null),
      `${compact(s.kv.capacity_tokens)} tokens in all`],
  ];
  const list = $("tiles");
  if (list.children.length !== tiles.length) {
    list.replaceChildren(...tiles.map(([name]) => tile(name)));
  }
  tiles.forEach(([, value, note], i) => {
    say(list.children[i].children[1], value);
    say(list.children[i].children[2], note);
  });
}

function tile(name) {
  const made = document.createElement("div");
  for (const tag of ["dt", "dd", "dd"]) made.append(document.createElement(tag));
  made.className = "tile";
  made.children[0].textContent = name;
  made.children[2].className = "note";
  return made;
}

function classes(waiting) {
  const some = Object.entries(waiting).filter(([, n]) => n > 0);
  return some.length ? some.map(([name, n]) => `${n} ${name}`).join(", ") : "nobody";
}

function drawHealth(s) {
  const restarts = Object.values(s.engine.restarts).reduce((a, b) => a + b, 0);
  const running = Object.entries(s.requests.running).map(([name, n]) => `${n} ${name}`).join(", ");
  facts($("health"), [
    ["Engine", s.engine.ready ? "ready" : s.engine.stage, s.engine.ready ? "" : "bad"],
    ["Replaced", restarts ? `${restarts === 1 ? "once" : `${count(restarts)} times`} (${reasons(s.engine.restarts)})` : "never"],
    ...(s.engine.failed_restarts ? [["Failed tries", count(s.engine.failed_restarts), "bad"]] : []),
    ["Models", s.engine.models.join(", ") || none],
    ["Window", s.engine.max_model_len ? `${count(s.engine.max_model_len)} tokens` : none],
    ["Running", running],
    ["Waiting", Object.entries(s.requests.waiting).map(([name, n]) => `${n} ${name}`).join(", ")],
    ["Limits", s.limits.mode === "redis" ? `in Redis, ${count(s.limits.replicas)} replica${s.limits.replicas === 1 ? "" : "s"}`
      : "in this process alone, while Redis does not answer", s.limits.mode === "redis" ? "" : "bad"],
    ["From the cache", cachedShare(s.counters)],
    ["Preempted", `${compact(s.counters.preemptions)} sequences`],
  ]);
  table($("fallbacks"), "Fallback servers", [{title: "Name"}, {title: "State"}, {title: "Requests"}],
    s.fallbacks.map((one) => [one.name, one.up ? {text: "up", badge: "good"} : {text: "down", badge: "bad"},
      reasons(one.requests) || "none yet"]), "None is configured.");
}

const reasons = (byReason) => Object.entries(byReason).map(([name, n]) => `${count(n)} ${name}`).join(", ");

const cachedShare = (c) => (c.prompt_tokens ? `${percent(c.cached_prompt_tokens / c.prompt_tokens)} of the prompts' tokens` : none);

function drawTenants(tenants) {
  const number = (title) => ({title, number: true});
  const columns = [{title: "Tenant"}, {title: "Class"}, number("Running"), number("Waiting"), number("Requests today"),
    number("Tokens read"), number("from cache"), number("Tokens generated"), {title: "Limits", wide: true}];
  const rows = tenants.shown.map((t) => [t.name, {text: t.class, badge: `class-${t.class}`}, count(t.running), count(t.waiting),
    count(t.today.requests), compact(t.today.prompt_tokens), compact(t.today.cached_tokens),
    compact(t.today.completion_tokens), limitsOf(t.limits)]);
  const more = tenants.total > rows.length ? [[`${count(tenants.total - rows.length)} more`, ...columns.slice(1).map(() => "")]] : [];
  table($("tenants"), "Tenants, the busiest first", columns, [...rows, ...more],
    tenants.problem || "There is no tenant: whoever reaches the server may use it, unless keys were given with --api-key.");
}

function limitsOf(limits) {
  const words = {requests_per_minute: "requests/min", tokens_per_minute: "tokens/min", tokens_per_day: "tokens/day",
    concurrency: "at once"};
  return Object.entries(limits).filter(([, n]) => n !== null).map(([name, n]) => `${compact(n)} ${words[name]}`).join(", ") || "none";
}

function drawBatches(batches, now_s) {
  const columns = [{title: "Batch"}, {title: "Tenant"}, {title: "State"}, {title: "Progress"}, {title: "Failed", number: true},
    {title: "Model"}, {title: "Age"}, {title: "Ends in"}];
  table($("batches"), "Batches", columns, batches.shown.map((b) => [
    b.id, b.tenant, {text: b.status, badge: b.status === "in_progress" ? "good" : "plain"},
    b.total ? {share: (b.completed + b.failed) / b.total, text: `${count(b.completed + b.failed)} of ${count(b.total)}`} : none,
    count(b.failed), b.model ?? none, span(now_s - b.created_at), span(b.expires_at - now_s),
  ]), batches.problem || "No batch is waiting or running.");
}

function drawRecent(id, entries, empty) {
  const columns = [{title: "Last"}, {title: "Times", number: true}, {title: "What"}, {title: "Status", number: true}, {title: "Tenant"},
    {title: "Route"}, {title: "Said", wide: true}, {title: "Last request"}];
  table($(id), id === "refusals" ? "Refusals" : "Shortened requests", columns, entries.map((e) => [time(e.last_s), count(e.count),
    e.code, {text: String(e.status), badge: e.status >= 500 ? "bad" : e.status >= 400 ? "warn" : "good"}, e.tenant || none,
    e.route, e.detail || none, e.request_id]), empty);
}
