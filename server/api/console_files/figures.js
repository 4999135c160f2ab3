// What snapshots of `/admin/overview` say together: counters become rates, histograms become quantiles of the time
// between. A counter that has fallen began anew with a new engine.

// `before` is the last snapshot before this one, `earlier` one of some seconds ago: a second has too few answers for
// quantiles.
export function figuresBetween(before, after, earlier) {
  const seconds = after.taken_at_s - before.taken_at_s;
  const grown = (pick) => growth(pick(before.counters), pick(after.counters));
  const perSecond = (pick) => {
    const change = grown(pick);
    return change === null || seconds <= 0 ? null : change / seconds;
  };
  const status = (group) => perSecond((c) => c.requests_by_status[group] ?? 0);
  const quantiles = (name) => {
    const seen = histogramBetween(earlier.histograms[name], after.histograms[name]);
    return {p50: quantile(seen, 0.5), p95: quantile(seen, 0.95)};
  };
  const kv = after.kv;
  return {
    at: after.taken_at_s,
    promptTokens: perSecond((c) => c.prompt_tokens),
    completionTokens: perSecond((c) => c.completion_tokens),
    answered: status("2xx"),
    refused: status("4xx"),
    failed: status("5xx"),
    ttft: quantiles("ttft_s"),
    itl: quantiles("itl_s"),
    queueWait: quantiles("queue_wait_s"),
    running: sum(after.requests.running),
    waiting: sum(after.requests.waiting),
    kvReserved: kv.capacity_tokens ? kv.reserved_tokens / kv.capacity_tokens : null,
    kvUsed: kv.capacity_tokens ? kv.used_tokens / kv.capacity_tokens : null,
  };
}

function growth(before, after) {
  if (after === null || after === undefined) return null;
  return before === null || before === undefined || after < before ? after : after - before;
}

const sum = (byClass) => Object.values(byClass).reduce((a, b) => a + b, 0);

// The observations between two cumulative histograms.
export function histogramBetween(before, after) {
  if (!after) return null;
  const last = after.counts.length - 1;
  const anew = !before || before.counts.length !== after.counts.length || before.counts[last] > after.counts[last];
  return {bounds: after.bounds, counts: after.counts.map((n, i) => (anew ? n : n - before.counts[i]))};
}

// The value below which a share of the observations lies, by a straight line inside its bucket; null without any.
export function quantile(histogram, share) {
  if (!histogram) return null;
  const {bounds, counts} = histogram;
  const total = counts[counts.length - 1];
  if (!total) return null;
  const rank = share * total;
  const i = counts.findIndex((n) => n >= rank);
  const low = i > 0 ? bounds[i - 1] : 0;
  if (bounds[i] === null) return low;
  const under = i > 0 ? counts[i - 1] : 0;
  const inside = counts[i] - under;
  return inside ? low + (bounds[i] - low) * ((rank - under) / inside) : low;
}
