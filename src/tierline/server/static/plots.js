// The plots of the Now page: thin columns of steps, tokens per second, first tokens.
//
// Each is made once from what the page carries and then given new columns; colours come from the
// page's own variables, so that dark mode and paper need nothing here.
"use strict";

(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const FONT = "12px system-ui, sans-serif";
  const plots = [];

  function axis(options = {}) {
    return {
      stroke: () => colour("--soft"), font: FONT, ticks: { show: false },
      grid: { stroke: () => colour("--rule"), width: 1 }, ...options,
    };
  }

  function plot(id, options, data) {
    const place = document.getElementById(id);
    if (!place) return null;
    const size = () => ({ width: place.clientWidth, height: place.clientHeight });
    const made = new uPlot({ ...size(), legend: { show: false }, padding: [8, 24, 0, 0], ...options }, data, place);
    new ResizeObserver(() => made.setSize(size())).observe(place);
    plots.push(made);
    return made;
  }

  const columns = (fill) => ({
    fill: () => colour(fill), stroke: () => colour(fill), width: 0, points: { show: false },
    paths: uPlot.paths.bars({ size: [0.86, 40, 1], align: 1 }),
  });

  // A tip that tells the exact values under the pointer.
  function tip(words) {
    let box;
    return { hooks: {
      init: (u) => {
        box = document.createElement("div");
        box.className = "tip";
        box.hidden = true;
        u.over.append(box);
        u.over.addEventListener("mouseleave", () => { box.hidden = true; });
      },
      setCursor: (u) => {
        const text = u.cursor.idx == null ? "" : words(u, u.cursor.idx);
        box.hidden = !text;
        box.textContent = text;
        const right = u.cursor.left > u.over.clientWidth / 2;
        box.style.left = right ? "" : `${u.cursor.left + 12}px`;
        box.style.right = right ? `${u.over.clientWidth - u.cursor.left + 12}px` : "";
      },
    } };
  }

  const clock = (s) => new Date(s * 1000).toLocaleTimeString([], { hour12: false });
  const time = axis({ values: (u, splits) => splits.map(clock), space: 80, size: 24 });
  const positive = (u, low, high) => [0, Math.max(high * 1.08, 1)];

  let steps = null, rates = null, ttft = null, limit = null, limits_s = [], window_s = 300, now_s = 0;

  const seconds = (s) => s >= 1 ? `${+s.toPrecision(3)} s` : `${+(s * 1000).toPrecision(3)} ms`;

  function steps_plot(series) {
    limit = series.limit_ms;
    return plot("plot-steps", {
      scales: {
        x: { time: false }, y: { range: positive },
        ms: { range: (u, low, high) => [0, Math.max(high, limit ?? 0, 1) * 1.08] },
      },
      axes: [
        axis({ label: "step", labelFont: FONT, labelSize: 18, size: 24, grid: { show: false }, space: 70 }),
        axis({ label: "tokens", labelFont: FONT, labelSize: 18, size: 46 }),
        axis({ label: "duration, ms", labelFont: FONT, labelSize: 18, size: 46, scale: "ms", side: 1, grid: { show: false } }),
      ],
      series: [
        {}, columns("--blue"), columns("--orange"),
        { scale: "ms", stroke: () => colour("--ink"), width: 1.5, points: { show: false } },
      ].map((s, i, all) => i === 1 ? all[2] : i === 2 ? all[1] : s),
      hooks: { draw: [(u) => line(u, limit, "ms", "--limit")] },
      plugins: [tip((u, i) => {
        const [n, all, decode, ms] = u.data.map((c) => c[i]);
        return `step ${n}: ${all - decode} prompt + ${decode} generated, ${ms} ms`;
      })],
    }, stacked(series.columns));
  }
  // The taller column is drawn first and the decodes over it.
  const stacked = ([n, decode, all, ms]) => [n, all, decode, ms];

  function line(u, value, scale, name) {
    if (value == null) return;
    const y = Math.round(u.valToPos(value, scale, true));
    if (!(y >= u.bbox.top && y <= u.bbox.top + u.bbox.height)) return;
    u.ctx.save();
    u.ctx.strokeStyle = colour(name);
    u.ctx.lineWidth = 2 * devicePixelRatio;
    u.ctx.setLineDash([7 * devicePixelRatio, 4 * devicePixelRatio]);
    u.ctx.beginPath();
    u.ctx.moveTo(u.bbox.left, y);
    u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
    u.ctx.stroke();
    u.ctx.restore();
  }

  function rates_plot(series) {
    const stepped = uPlot.paths.stepped({ align: 1 });
    return plot("plot-rates", {
      scales: { y: { range: positive } },
      axes: [time, axis({ size: 52 })],
      series: [
        {},
        { stroke: () => colour("--blue"), width: 2, paths: stepped, points: { show: false } },
        { stroke: () => colour("--orange"), width: 2, dash: [5, 3], paths: stepped, points: { show: false } },
      ],
      plugins: [tip((u, i) => `${clock(u.data[0][i])}: ${u.data[1][i]} generated, ${u.data[2][i]} of prompts`)],
    }, series.columns);
  }

  const LEVELS = ["--blue", "--green", "--purple", "--limit", "--grey"];

  function ttft_plot(series) {
    remember(series);
    const dots = (i) => ({
      stroke: () => colour(LEVELS[i % LEVELS.length]), paths: () => null,
      points: { show: (u, s) => { draw_marks(u, s, series.marks[i]); return false; } },
    });
    return plot("plot-ttft", {
      scales: {
        x: { range: () => [now_s - window_s, now_s] },
        y: { distr: 3, range: (u, low, high) => {
          const known = limits_s.filter((s) => s != null);
          return [Math.min(low ?? 0.01, ...known) / 1.6, Math.max(high ?? 1, ...known) * 1.6];
        } },
      },
      axes: [time, axis({ size: 60, grid: { show: false }, values: (u, splits) => splits.map((s) => s == null ? "" : seconds(s)) })],
      series: [{}, ...series.names.map((_, i) => dots(i))],
      hooks: { draw: [(u) => limits_s.forEach((s, i) => line(u, s, "y", LEVELS[i % LEVELS.length]))] },
      plugins: [tip((u, i) => {
        const at = u.data.findIndex((c, s) => s && c[i] != null);
        return at < 0 ? "" : `${clock(u.data[0][i])} ${series.names[at - 1]}: ${seconds(u.data[at][i])}`;
      })],
    }, series.columns);
  }

  function draw_marks(u, s, sign) {
    u.ctx.save();
    u.ctx.fillStyle = colour(LEVELS[(s - 1) % LEVELS.length]);
    u.ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    u.ctx.textAlign = "center";
    u.ctx.textBaseline = "middle";
    u.data[s].forEach((value, i) => {
      if (value == null || u.data[0][i] < now_s - window_s) return;
      u.ctx.fillText(sign, u.valToPos(u.data[0][i], "x", true), u.valToPos(value, "y", true));
    });
    u.ctx.restore();
  }

  function remember(series) {
    ({ limits_s, window_s, now_s } = series);
  }

  function show({ series }) {
    if (!series) return;
    if (steps === null) {
      steps = steps_plot(series.steps);
      rates = rates_plot(series.rates);
      ttft = ttft_plot(series.ttft);
      return;
    }
    limit = series.steps.limit_ms;
    remember(series.ttft);
    steps?.setData(stacked(series.steps.columns));
    rates?.setData(series.rates.columns);
    ttft?.setData(series.ttft.columns);
  }

  document.addEventListener("tierline:view", (event) => show(event.detail));
  const first = document.getElementById("first");
  if (first) show(JSON.parse(first.textContent));
  for (const query of ["(prefers-color-scheme: dark)", "print"])
    matchMedia(query).addEventListener("change", () => plots.forEach((p) => p.redraw()));
})();
