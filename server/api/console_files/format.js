// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const one = new Intl.NumberFormat("en", {maximumFractionDigits: 1});
const short = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const clock = new Intl.DateTimeFormat("en-GB", {hour: "2-digit", minute: "2-digit", second: "2-digit"});

export const none = "–";

export const count = (n) => (n === null || n === undefined ? none : whole.format(n));
export const rate = (n) => (n === null || n === undefined ? none : n >= 100 ? whole.format(n) : one.format(n));
export const compact = (n) => (n === null || n === undefined ? none : n < 10000 ? whole.format(n) : short.format(n));
export const percent = (share) => (share === null || share === undefined ? none
  : share > 0 && share < 0.01 ? "< 1 %" : `${Math.round(share * 100)} %`);
export const time = (seconds) => clock.format(new Date(seconds * 1000));

// A short length of time: 12 ms, 3.4 s.
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return none;
  if (seconds < 0.9995) return `${seconds < 0.01 ? one.format(seconds * 1000) : whole.format(seconds * 1000)} ms`;
  return seconds < 60 ? `${one.format(seconds)} s` : span(seconds);
}

// A long one, in its two largest units: 3 h 12 min.
export function span(seconds) {
  const total = Math.max(0, Math.round(seconds));
  const [d, h, m, s] = [Math.floor(total / 86400), Math.floor(total / 3600) % 24, Math.floor(total / 60) % 60, total % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}
