"use strict";
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const picked = { prompt: 0, method: null, ratio: null, colour: "layers" };
  const find = (selector) => document.querySelector(selector);
  const percent = (share) => (share >= 0.095 || share === 0 ? Math.round(100 * share) : (100 * share).toFixed(1)) + " %";
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x"];

  // -- look ---------------------------------------------------------------------------------------

  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    const take = (name) => style.getPropertyValue("--" + name).trim();
    return {
      ink: take("ink"), quiet: take("quiet"), line: take("line"), cold: take("cold"), hot: take("hot"),
      colours: Array.from({ length: 8 }, (_, index) => take("m" + index)),
    };
  }
  const colourOf = (theme, method) => theme.colours[payload.methods.indexOf(method) % theme.colours.length];
  const dashOf = (method) => DASHES[Math.floor(payload.methods.indexOf(method) / 8) % DASHES.length];
  const symbolOf = (method) => SYMBOLS[payload.methods.indexOf(method) % SYMBOLS.length];

  function layOut(theme, more) {
    const axis = {
      gridcolor: theme.line, linecolor: theme.line, zeroline: false, fixedrange: true, automargin: true,
      tickfont: { color: theme.quiet, size: 12 }, title: { font: { color: theme.quiet, size: 12 }, standoff: 8 },
    };
    const merge = (own) => ({ ...axis, ...own, title: { ...axis.title, text: own && own.text } });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, color: theme.ink, size: 12 },
      margin: { l: 8, r: 14, t: 14, b: 8 }, hovermode: "closest", ...more,
      xaxis: merge(more.xaxis), yaxis: merge(more.yaxis),
    };
  }

  // -- quality ------------------------------------------------------------------------------------

  function drawTask(theme, element) {
    const task = payload.tasks[Number(element.dataset.index)];
    const kept = task.curves.flatMap((curve) => curve.points.map((point) => point.kept));
    const ends = [Math.min(...kept) / 1.12, Math.max(...kept) * 1.12];
    const data = task.curves.map((curve, place) => ({
      type: "scatter", mode: "lines+markers", name: curve.method,
      // A little apart, so that intervals of several methods at one share stay readable.
      x: curve.points.map((point) => point.kept * (1 + 0.018 * (place - (task.curves.length - 1) / 2))),
      y: curve.points.map((point) => point.mean),
      error_y: {
        type: "data", symmetric: false, thickness: 1.4, width: 3,
        array: curve.points.map((point) => point.high - point.mean),
        arrayminus: curve.points.map((point) => point.mean - point.low),
      },
      text: curve.points.map((point) =>
        `${curve.method}<br>${percent(point.kept)} kept: ${point.mean.toFixed(3)} [${point.low.toFixed(3)}, ${point.high.toFixed(3)}]`),
      hoverinfo: "text", line: { color: colourOf(theme, curve.method), width: 2, dash: dashOf(curve.method) },
      marker: { color: colourOf(theme, curve.method), size: 8, symbol: symbolOf(curve.method) },
    }));
    const level = (value, name, dash) => ({
      type: "scatter", mode: "lines", x: ends, y: [value, value], hoverinfo: "text", text: `${name}: ${value.toFixed(3)}`,
      line: { color: theme.quiet, width: 1.4, dash },
    });
    if (task.full !== null) data.push(level(task.full, "full cache", "dash"));
    if (task.guess !== null) data.push(level(task.guess, "guessing", "dot"));
    const ratios = [...new Set(task.curves.flatMap((curve) => curve.points.map((point) => point.ratio)))].sort((a, b) => a - b);
    const shown = ratios.filter((ratio, place) => place === 0 || ratio / ratios[place - 1] > 1.25);
    return { data, layout: layOut(theme, {
      xaxis: { type: "log", tickvals: shown, ticktext: shown.map(percent), range: ends.map(Math.log10), text: "share of the KV cache kept" },
      yaxis: { tickformat: ".3~g" },
    }) };
  }

  // -- one prompt ---------------------------------------------------------------------------------

  const prompt = () => payload.maps[picked.prompt];
  const setting = () => prompt().settings.find((one) => one.method === picked.method && one.ratio === picked.ratio) || prompt().settings[0];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const maps = (theme) => [[0, theme.cold], [1, theme.hot]];

  function drawRanks(theme) {
    const { layer_indices: layers, head_ranks: ranks } = prompt();
    return {
      data: [{ type: "bar", x: layers, y: ranks.map(mean), marker: { color: theme.quiet }, hovertemplate: "layer %{x}: %{y:.2f}<extra></extra>" }],
      layout: layOut(theme, { xaxis: { text: "layer" }, yaxis: { rangemode: "tozero" }, bargap: 0.25 }),
    };
  }

  function drawBudgets(theme) {
    const settings = prompt().settings.filter((one) => one.ratio === picked.ratio);
    return {
      data: settings.map((one) => ({
        type: "scatter", mode: "lines+markers", name: one.method, x: prompt().layer_indices, y: one.budgets,
        opacity: one.method === picked.method ? 1 : 0.55,
        line: { color: colourOf(theme, one.method), width: one.method === picked.method ? 2.6 : 1.4, dash: dashOf(one.method) },
        marker: { color: colourOf(theme, one.method), size: one.method === picked.method ? 7 : 4, symbol: symbolOf(one.method) },
        hovertemplate: `${one.method.replaceAll("<", "&lt;")}<br>layer %{x}: %{y:,} tokens<extra></extra>`,
      })),
      layout: layOut(theme, { xaxis: { text: "layer" }, yaxis: { rangemode: "tozero", tickformat: ",~d" } }),
    };
  }

  function drawMap(theme, values, xText, hover, extra) {
    return {
      data: [{
        type: "heatmap", z: values, y: prompt().layer_indices, colorscale: maps(theme), hovertemplate: hover, xgap: 1, ygap: 1,
        colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: theme.quiet, size: 11 }, ...extra.colorbar }, ...extra.trace,
      }],
      layout: layOut(theme, {
        xaxis: { text: xText, showgrid: false, ...extra.xaxis }, yaxis: { text: "layer", autorange: "reversed", showgrid: false },
      }),
    };
  }
  const drawHeadRanks = (theme) => drawMap(theme, prompt().head_ranks, "query head", "layer %{y}, head %{x}: %{z:.2f}<extra></extra>", { xaxis: { dtick: 1 } });
  const drawHeadKept = (theme) => drawMap(theme, setting().head_kept, "key/value head", "layer %{y}, head %{x}: %{z:,} tokens<extra></extra>", { xaxis: { dtick: 1 }, trace: { zmin: 0 } });
  function drawStretches(theme) {
    const values = setting().stretch_shares;
    const count = values[0].length;
    return drawMap(theme, values, "place in the prompt", "layer %{y}, at %{x:.0f} % of the prompt: %{z:.0%} kept<extra></extra>", {
      xaxis: { ticksuffix: " %" },
      trace: { zmin: 0, zmax: 1, xgap: 0, ygap: 0, x: Array.from({ length: count }, (_, place) => (100 * (place + 0.5)) / count) },
      colorbar: { tickformat: ".0%" },
    });
  }

  // Steeper where little is kept, so that a token of a few layers is told from one of none.
  function paint(span, kept) {
    span.style.setProperty("--kept", Math.round(100 * kept ** 0.6) + "%");
    span.classList.toggle("gone", kept === 0);
    return span;
  }

  function drawScale() {
    find("[data-scale]").replaceChildren(...[0, 0.1, 0.25, 0.5, 0.75, 1].map((kept) => {
      const span = document.createElement("span");
      span.textContent = kept === 0 ? "none" : kept === 1 ? "all" : percent(kept);
      return paint(span, kept);
    }));
  }

  function drawText() {
    const { tokens, layer_indices: layers } = prompt();
    const one = setting();
    const box = find("[data-text]");
    const byLayers = picked.colour === "layers";
    let all = 0, none = 0;
    const spans = tokens.map((token, place) => {
      const share = one.token_shares[place];
      all += share >= 1; none += share === 0;
      const span = document.createElement("span");
      span.textContent = token;
      const kept = byLayers ? one.token_layers[place] / layers.length : share;
      span.dataset.place = place;
      return paint(span, kept);
    });
    box.replaceChildren(...spans);
    const total = tokens.length, some = total - all - none;
    find("[data-fates]").textContent =
      `${picked.method} keeps ${percent(mean(one.token_shares))} of the cache of this prompt: of its ${total.toLocaleString("en")} tokens ` +
      `${all.toLocaleString("en")} are kept by every head of every layer, ${some.toLocaleString("en")} by some, ${none.toLocaleString("en")} by none.`;
  }

  function tellToken(event) {
    const place = event.target.dataset && event.target.dataset.place;
    if (place === undefined) return;
    const one = setting();
    find("[data-token]").textContent =
      `Token ${Number(place).toLocaleString("en")}, ${JSON.stringify(prompt().tokens[place])}: kept in ${one.token_layers[place]} of ` +
      `${prompt().layer_indices.length} layers, by ${percent(one.token_shares[place])} of all heads.`;
  }

  function fill(name, values, show) {
    const select = find(`[data-pick="${name}"]`);
    select.replaceChildren(...values.map((value) => new Option(show(value), value)));
    if (!values.includes(picked[name])) picked[name] = values[values.length - 1];
    select.value = picked[name];
  }
  function fillPickers() {
    const unique = (key) => [...new Set(prompt().settings.map((one) => one[key]))];
    fill("method", unique("method"), String);
    const ratios = unique("ratio").sort((a, b) => a - b);
    if (picked.ratio === null) picked.ratio = ratios[0];
    fill("ratio", ratios, percent);
  }

  // -- speed --------------------------------------------------------------------------------------

  function drawTimes(theme) {
    const rows = [...payload.speed.ratios].reverse();
    const names = rows.map((row) => `${row.what}<br>${row.setting}`);
    return {
      data: [{
        type: "scatter", mode: "markers", x: rows.map((row) => row.ratio), y: names, marker: { color: theme.hot, size: 9 },
        error_x: { type: "data", symmetric: false, array: rows.map((row) => row.high - row.ratio), arrayminus: rows.map((row) => row.ratio - row.low), color: theme.hot, thickness: 1.6 },
        hovertemplate: "%{y}: %{x:.3f}<extra></extra>",
      }],
      layout: layOut(theme, {
        xaxis: { text: "ratio" }, yaxis: { showgrid: false },
        shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: theme.quiet, dash: "dash", width: 1.3 } }],
      }),
    };
  }
  function drawSizes(theme) {
    const rows = [...payload.speed.sizes].reverse();
    const names = rows.map((row) => row.setting.replace(", peak", ",<br>peak"));
    const bars = (key, name, color) => ({
      type: "bar", orientation: "h", name, x: rows.map((row) => row[key]), y: names, marker: { color },
      text: rows.map((row) => row[key].toFixed(0)), textposition: "auto", hovertemplate: `${name}: %{x:.1f} MB<extra></extra>`,
    });
    return {
      data: [bars("kept", "RankKV", theme.hot), bars("full", "full cache", theme.quiet)],
      layout: layOut(theme, { xaxis: { text: "MB" }, yaxis: { showgrid: false }, bargap: 0.3 }),
    };
  }

  // -- everything ---------------------------------------------------------------------------------

  const DRAWERS = {
    task: drawTask, ranks: drawRanks, budgets: drawBudgets, stretches: drawStretches, "head-ranks": drawHeadRanks,
    "head-kept": drawHeadKept, times: drawTimes, sizes: drawSizes,
  };

  function drawKeys(theme) {
    for (const box of document.querySelectorAll("[data-keys]")) {
      box.replaceChildren(...payload.methods.map((method) => {
        const entry = document.createElement("span");
        const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        picture.setAttribute("width", "22"); picture.setAttribute("height", "10");
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        const dash = { solid: "", dash: "5 3", dot: "2 3", dashdot: "5 3 2 3" }[dashOf(method)];
        for (const [name, value] of Object.entries({ x1: 1, x2: 21, y1: 5, y2: 5, stroke: colourOf(theme, method), "stroke-width": 3, "stroke-dasharray": dash }))
          line.setAttribute(name, value);
        picture.append(line);
        entry.append(picture, method);
        return entry;
      }));
    }
  }

  function draw() {
    const theme = readTheme();
    drawKeys(theme);
    if (payload.maps.length) { drawScale(); drawText(); }
    for (const element of document.querySelectorAll("[data-chart]")) {
      const { data, layout } = DRAWERS[element.dataset.chart](theme, element);
      Plotly.react(element, data, layout, { displayModeBar: false, responsive: true });
    }
  }

  if (payload.maps.length) {
    fillPickers();
    for (const select of document.querySelectorAll("[data-pick]")) {
      select.addEventListener("change", () => {
        const { pick } = select.dataset;
        picked[pick] = pick === "prompt" || pick === "ratio" ? Number(select.value) : select.value;
        if (pick === "prompt") fillPickers();
        draw();
      });
    }
    const box = find("[data-text]");
    for (const kind of ["pointerover", "click"]) box.addEventListener(kind, tellToken);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
