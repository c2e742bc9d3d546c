"use strict";
// The page's curves and colours, drawn from the JSON beside them; nothing is loaded.
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const COLOURS = ["#3b7dd8", "#d9822b", "#2e9e5b", "#c94f4f", "#8a63c9", "#8c6d4f", "#d06fb0", "#6f7f8f"];
  const INK = "#888";
  const tip = $("tip");

  function say(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  }

  function show(event, lines) {
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 14 + box.width > innerWidth;
    tip.style.left = (right ? Math.max(0, event.clientX - 14 - box.width) : event.clientX + 14) + "px";
    tip.style.top = Math.max(0, Math.min(event.clientY + 14, innerHeight - box.height)) + "px";
  }
  const hide = () => { tip.hidden = true; };

  // The value at a share of the sorted numbers.
  function quantile(sorted, share) {
    return sorted.length ? sorted[Math.round(share * (sorted.length - 1))] : 0;
  }

  function options(select, labels) {
    select.replaceChildren(...labels.map((label, i) => new Option(label, i)));
  }

  // Text ------------------------------------------------------------------------------------------------
  const words = Array.from($("text").children);
  words.forEach((word, i) => { word.place = i; });
  const measure = () => D.measures[$("measure").value];
  let span = [0, 1];
  let marked = null;

  function shade(value) {
    if (value === null) return "transparent";
    const share = Math.max(0, Math.min(1, (value - span[0]) / (span[1] - span[0] || 1)));
    return "rgba(217,95,43," + (0.85 * share).toFixed(2) + ")";
  }

  function paint() {
    const values = measure().values;
    const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
    span = [quantile(sorted, 0.02), quantile(sorted, 0.98)];
    words.forEach((word, i) => { word.style.backgroundColor = shade(values[i]); });
    $("low").textContent = say(span[0]);
    $("high").textContent = say(span[1]) + " " + measure().unit;
    $("scale").style.background = "linear-gradient(90deg, transparent, rgba(217,95,43,.85))";
    draw($("ribbon"));
  }

  function told(i) {
    const lines = ["token " + i + "  " + JSON.stringify(words[i].textContent.replaceAll("⏎\n", "\n"))];
    for (const m of D.measures) lines.push(m.label + "  " + say(m.values[i]));
    for (const m of D.memories) {
      const bin = nearest(m.starts, i, true);
      const rates = Object.entries(m.rates).map(([name, r]) => name + " " + say(r.mean[bin]));
      lines.push(m.name + "  " + rates.join("  "));
    }
    return lines;
  }

  $("text").addEventListener("mousemove", (event) => {
    if (event.target.place === undefined) hide();
    else show(event, told(event.target.place));
  });
  $("text").addEventListener("mouseleave", hide);
  $("measure").addEventListener("change", paint);

  function goTo(i) {
    if (marked) marked.classList.remove("here");
    marked = words[Math.max(0, Math.min(words.length - 1, i))];
    marked.classList.add("here");
    $("text").scrollTop = marked.offsetTop - $("text").offsetTop - 60;
  }

  // Plots -----------------------------------------------------------------------------------------------
  // A plot is a canvas with a function that draws it and one that tells about a place in it.
  const LEFT = 56, BOTTOM = 22, TOP = 8;

  function draw(canvas) {
    if (!canvas || !canvas.plot) return;
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.tall;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = "11px system-ui, sans-serif";
    ctx.lineWidth = 1;
    canvas.plot(ctx, width, height);
  }

  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => {
    if (entry.target.drawnAt !== entry.target.clientWidth) {
      entry.target.drawnAt = entry.target.clientWidth;
      draw(entry.target);
    }
  }));

  function plot(canvas, paintIt, tell, height) {
    canvas.tall = height || canvas.tall || Number(canvas.getAttribute("height"));
    canvas.plot = paintIt;
    if (!canvas.tell) {
      canvas.addEventListener("mousemove", (event) => {
        const lines = canvas.tell(event.offsetX, event.offsetY, canvas.clientWidth, canvas.tall);
        if (lines) show(event, lines);
        else hide();
      });
      canvas.addEventListener("mouseleave", hide);
      watcher.observe(canvas);
    }
    canvas.tell = tell;
    draw(canvas);
  }

  // Index of the number nearest to x among rising ones; with `below` the last that is not above it.
  function nearest(rising, x, below) {
    let low = 0, high = rising.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (rising[middle] <= x) low = middle;
      else high = middle - 1;
    }
    if (!below && low + 1 < rising.length && rising[low + 1] - x < x - rising[low]) low += 1;
    return low;
  }

  function axes(ctx, width, height, range, xEnd, xLabel) {
    const [low, high] = range, tall = height - TOP - BOTTOM;
    ctx.strokeStyle = ctx.fillStyle = INK;
    ctx.beginPath();
    ctx.moveTo(LEFT, TOP);
    ctx.lineTo(LEFT, height - BOTTOM);
    ctx.lineTo(width - 4, height - BOTTOM);
    ctx.stroke();
    ctx.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      ctx.fillText(say(low + share * (high - low)), LEFT - 6, TOP + tall * (1 - share) + 4);
    }
    ctx.fillText(say(xEnd) + " " + xLabel, width - 4, height - 6);
    ctx.textAlign = "left";
    ctx.fillText("0", LEFT, height - 6);
    const x = (value) => LEFT + (value / (xEnd || 1)) * (width - LEFT - 4);
    const y = (value) => TOP + tall * (1 - (value - low) / (high - low || 1));
    return [x, y];
  }

  // series: {label, ys, low, high, thin}
  function curves(canvas, xs, xEnd, series, height) {
    const all = series.flatMap((s) => [...s.ys, ...(s.low || []), ...(s.high || [])]).filter((v) => v !== null);
    let low = Math.min(...all), high = Math.max(...all);
    if (!all.length) [low, high] = [0, 1];
    if (low >= 0 && low < 0.7 * high) low = 0;
    if (high === low) high = low + (Math.abs(low) || 1);
    const paintIt = (ctx, width, tall) => {
      const [x, y] = axes(ctx, width, tall, [low, high], xEnd, "tokens");
      series.forEach((s, n) => {
        ctx.strokeStyle = ctx.fillStyle = s.colour || COLOURS[n % COLOURS.length];
        if (s.low) {
          ctx.globalAlpha = 0.18;
          ctx.beginPath();
          xs.forEach((at, i) => ctx.lineTo(x(at), y(s.high[i])));
          for (let i = xs.length - 1; i >= 0; i--) ctx.lineTo(x(xs[i]), y(s.low[i]));
          ctx.fill();
        }
        ctx.globalAlpha = s.thin ? 0.5 : 1;
        ctx.lineWidth = s.thin ? 1 : 2;
        ctx.beginPath();
        let pen = false;
        s.ys.forEach((value, i) => {
          if (value === null) { pen = false; return; }
          if (pen) ctx.lineTo(x(xs[i]), y(value));
          else ctx.moveTo(x(xs[i]), y(value));
          pen = true;
        });
        ctx.stroke();
        ctx.globalAlpha = 1;
      });
      let at = LEFT + 8;
      series.filter((s) => !s.thin).forEach((s, n) => {
        ctx.fillStyle = s.colour || COLOURS[series.indexOf(s) % COLOURS.length];
        ctx.fillText(s.label, at, TOP + 8);
        at += ctx.measureText(s.label).width + 12;
      });
    };
    const tell = (px, py, width) => {
      const i = nearest(xs, ((px - LEFT) / (width - LEFT - 4)) * xEnd);
      return ["token " + xs[i], ...series.map((s) => {
        const range = s.low ? "  (" + say(s.low[i]) + " to " + say(s.high[i]) + ")" : "";
        return s.label + "  " + say(s.ys[i]) + range;
      })];
    };
    plot(canvas, paintIt, tell, height);
  }

  // Blue for 1, nothing for 0, red below.
  function diverging(value) {
    const share = Math.max(-1, Math.min(1, value));
    return share >= 0 ? "rgba(59,125,216," + share.toFixed(3) + ")" : "rgba(201,79,79," + (-share).toFixed(3) + ")";
  }

  // Cells in rows; colour(row, column) is null for none.
  function cells(canvas, rows, columns, colour, tell, height, labels) {
    const where = (width, tall) => [(width - LEFT - 4) / columns, (tall - TOP - BOTTOM) / rows];
    plot(canvas, (ctx, width, tall) => {
      const [w, h] = where(width, tall);
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          const fill = colour(r, c);
          if (fill === null) continue;
          ctx.fillStyle = fill;
          ctx.fillRect(LEFT + c * w, TOP + r * h, Math.ceil(w), Math.ceil(h));
        }
      }
      ctx.strokeStyle = ctx.fillStyle = INK;
      ctx.strokeRect(LEFT, TOP, width - LEFT - 4, tall - TOP - BOTTOM);
      ctx.textAlign = "right";
      ctx.fillText(labels[0], LEFT - 6, TOP + 10);
      ctx.fillText(labels[1], LEFT - 6, tall - BOTTOM);
      ctx.fillText(labels[3], width - 4, tall - 6);
      ctx.textAlign = "left";
      ctx.fillText(labels[2], LEFT, tall - 6);
    }, (px, py, width, tall) => {
      const [w, h] = where(width, tall);
      const r = Math.floor((py - TOP) / h), c = Math.floor((px - LEFT) / w);
      return r >= 0 && r < rows && c >= 0 && c < columns ? tell(r, c) : null;
    }, height);
  }

  // Ribbon: mean and greatest value of the measure in each pixel ------------------------------------------
  function ribbon() {
    const canvas = $("ribbon");
    const at = (px, width) => Math.floor(((px - LEFT) / (width - LEFT - 4)) * D.count);
    plot(canvas, (ctx, width, tall) => {
      const values = measure().values, known = values.filter((v) => v !== null);
      const low = known.reduce((a, b) => Math.min(a, b), 0), high = known.reduce((a, b) => Math.max(a, b), low);
      const [, y] = axes(ctx, width, tall, [low, high], D.count, "tokens");
      const mean = [];
      ctx.fillStyle = "rgba(217,95,43,.45)";
      for (let px = LEFT; px < width - 4; px++) {
        const from = Math.max(0, at(px, width)), to = Math.max(from + 1, at(px + 1, width));
        const part = values.slice(from, to).filter((v) => v !== null);
        if (!part.length) continue;
        const most = Math.max(...part);
        ctx.fillRect(px, y(most), 1, y(low) - y(most));
        mean.push([px, part.reduce((a, b) => a + b, 0) / part.length]);
      }
      ctx.strokeStyle = INK;
      ctx.beginPath();
      mean.forEach(([px, value]) => ctx.lineTo(px, y(value)));
      ctx.stroke();
    }, (px, py, width) => {
      const i = at(px, width);
      return i >= 0 && i < D.count ? told(i) : null;
    });
    canvas.addEventListener("click", (event) => goTo(at(event.offsetX, canvas.clientWidth)));
  }

  // Memories ----------------------------------------------------------------------------------------------
  const HEAT = 300;
  const memory = () => D.memories[$("memory").value];

  function recall() {
    const m = memory(), rows = m[$("answer").value];
    const value = (p, t) => rows[t][p];
    cells($("recall"), m.probes.length, D.moments.length, (p, t) => {
      const v = value(p, t);
      return v === null ? null : diverging(v);
    }, (p, t) => {
      const i = m.probes[p];
      return ["key of token " + i + "  " + JSON.stringify(words[i].textContent),
        "memory after " + D.moments[t] + " tokens",
        value(p, t) === null ? "not read yet" : $("answer").selectedOptions[0].textContent + "  " + say(value(p, t))];
    }, HEAT, ["token " + m.probes[0], String(m.probes[m.probes.length - 1]),
      "after " + D.moments[0], "after " + D.moments[D.moments.length - 1] + " tokens"]);
  }

  function singular() {
    const lines = memory().singular[$("matrix").value][$("head").value];
    const labels = ["largest", "25 %", "median", "75 %", "smallest"];
    curves($("singular"), D.moments, D.count, lines.map((ys, n) => ({ label: labels[n], ys })));
  }

  function distance() {
    const m = memory();
    const series = m.distance[$("head").value].map((ys, n) => ({ label: m.memories[n], ys }));
    curves($("distance"), D.moments, D.count, series);
  }

  function rates() {
    const m = memory();
    $("rate-plots").replaceChildren();
    const names = { "η": "learning rate η", "α": "retention α", "μ": "decay of the momentum μ" };
    for (const [name, r] of Object.entries(m.rates)) {
      const box = document.createElement("div"), title = document.createElement("h3");
      const canvas = document.createElement("canvas");
      title.textContent = names[name];
      box.append(title, canvas);
      $("rate-plots").append(box);
      const heads = r.heads.map((ys, h) => ({ label: "head " + h, ys, thin: true, colour: COLOURS[(h + 1) % COLOURS.length] }));
      curves(canvas, m.starts, D.count, [{ label: "mean", ys: r.mean, low: r.low, high: r.high }, ...heads], 200);
    }
  }

  function memories() {
    const m = memory();
    options($("head"), ["mean over heads", ...Array.from({ length: m.heads }, (_, h) => "head " + h)]);
    $("matrix").replaceChildren(...Object.keys(m.singular).map((name) => new Option("of " + name, name)));
    recall();
    singular();
    distance();
    rates();
  }

  if (D.memories.length) {
    $("memory").addEventListener("change", memories);
    $("head").addEventListener("change", () => { singular(); distance(); });
    $("matrix").addEventListener("change", singular);
    $("answer").addEventListener("change", recall);
  }

  // Writes ------------------------------------------------------------------------------------------------
  function timeline() {
    const lane = 44, canvas = $("timeline");
    const x = (at, width) => LEFT + (at / D.count) * (width - LEFT - 4);
    plot(canvas, (ctx, width) => {
      D.timeline.forEach((line, n) => {
        const base = (n + 1) * lane;
        const most = line.marks.reduce((a, mark) => Math.max(a, mark[1] || 0), 0) || 1;
        ctx.fillStyle = INK;
        ctx.fillText(line.label + ": " + line.note, LEFT, base - 30);
        ctx.fillRect(LEFT, base, width - LEFT - 4, 1);
        ctx.fillStyle = COLOURS[n % COLOURS.length];
        for (const [at, size] of line.marks) {
          if (size === null) ctx.fillRect(x(at, width) - 1.5, base - 3, 3, 3);
          else ctx.fillRect(x(at, width) - 1, base - 2 - (22 * size) / most, 2, 2 + (22 * size) / most);
        }
      });
    }, (px, py, width) => {
      const line = D.timeline[Math.floor(py / lane)];
      if (!line) return null;
      if (!line.marks.length) return [line.label, "no boundary in this text"];
      const at = ((px - LEFT) / (width - LEFT - 4)) * D.count;
      const mark = line.marks[nearest(line.marks.map((m) => m[0]), at)];
      return [line.label, "after token " + mark[0], mark[2]];
    }, lane * D.timeline.length + 8);
  }

  function units() {
    const most = Math.max(...D.units.map((line) => line.norms[0])) || 1;
    const columns = Math.max(...D.units.map((line) => line.units.length));
    cells($("units"), D.units.length, columns, (r, c) => {
      const norm = D.units[r].norms[c];
      return norm === undefined || norm === null ? null : diverging(norm / most);
    }, (r, c) => {
      const line = D.units[r];
      return line.units[c] === undefined ? null : [line.label, "unit " + line.units[c] + "  ‖Δ‖ " + say(line.norms[c])];
    }, Math.max(60, 14 * D.units.length + TOP + BOTTOM), ["first", "last", "changed most", "…"]);
  }

  ribbon();
  paint();
  if (D.memories.length) memories();
  if (D.timeline.length) timeline();
  if (D.units.length) units();
})();
