"use strict";
// Draws each <figure data-chart> from the JSON beside it. No library, no request: see docs/report.md.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "1 4"];
const SHOWN_IN_TIP = 14;

function node(name, attributes = {}, parent = null, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function shape(name, attributes, parent, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

// ---- numbers -----------------------------------------------------------------------------------

function superscript(power) {
  return String(power).replace(/[-0-9]/g, (digit) =>
    digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)]);
}

function shown(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) {
    const [fraction, power] = value.toExponential(digits - 1).split("e");
    const short = String(Number(fraction));
    const ten = `10${superscript(Number(power))}`;
    return (short === "1" ? ten : short === "-1" ? `−${ten}` : `${short}·${ten}`).replace("-", "−");
  }
  const short = Number.isInteger(value) ? value : Number(value.toPrecision(digits));
  const grouped = size >= 1e4 ? short.toLocaleString("en-US") : String(short);
  return grouped.replace("-", "−");
}

function unpacked(list) {
  if (Array.isArray(list)) return list;
  return Array.from({ length: list.count }, (_, place) => list.from + place * list.by);
}

// A scale turns a number into 0..1 along its axis; outside is outside.
function scale(low, high, log) {
  const to = log ? Math.log10 : (value) => value;
  const [first, last] = [to(low), to(high)];
  return {
    low, high, log,
    at: (value) => (to(value) - first) / (last - first),
    from: (share) => log ? 10 ** (first + share * (last - first)) : first + share * (last - first),
  };
}

function linearTicks(low, high, count, whole) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n += 1) {
    ticks.push({ at: Number((n * step).toPrecision(12)), major: true });
  }
  return ticks;
}

function logTicks(low, high, count) {
  const [first, last] = [Math.log10(low), Math.log10(high)];
  if (last - first < 1) return linearTicks(low, high, count, false);
  const stride = Math.max(1, Math.ceil((last - first) / Math.max(count, 1)));
  const ticks = [];
  for (let power = Math.floor(first); power <= last; power += 1) {
    for (let digit = 1; digit < 10; digit += 1) {
      const at = digit * 10 ** power;
      if (at < low * (1 - 1e-9) || at > high * (1 + 1e-9)) continue;
      const named = digit === 1 ? power % stride === 0
        : last - first < 2.2 && (digit === 2 || digit === 5);
      if (named || (digit === 1) || last - first < 5) ticks.push({ at, major: named });
    }
  }
  return ticks;
}

// ---- one figure --------------------------------------------------------------------------------

class Plot {
  constructor(figure) {
    this.figure = figure;
    this.data = JSON.parse(document.getElementById(`${figure.id}-data`).textContent);
    for (const panel of this.data.panels) {
      for (const series of panel.series) {
        for (const key of ["x", "y", "low", "high"]) series[key] = unpacked(series[key]);
      }
    }
    this.controls = node("div", { class: "controls" });
    this.frame = node("div", { class: "frame" });
    this.plot = node("div", {
      class: "plot", tabindex: "0", role: "application",
      "aria-roledescription": "interactive plot",
    }, this.frame);
    this.tip = node("div", { class: "tip", hidden: "", "aria-hidden": "true" }, this.frame);
    this.said = node("p", { class: "unseen", role: "status", "aria-live": "polite" });
    this.legend = node("fieldset", { class: "legend" });
    this.note = node("p", { class: "note" });
    const details = figure.querySelector("details");
    figure.insertBefore(this.controls, details);
    figure.insertBefore(this.frame, details);
    figure.insertBefore(this.said, details);
    figure.insertBefore(this.legend, details);
    figure.insertBefore(this.note, details);
    this.details = details;
    details.addEventListener("toggle", () => this.fillTable());
    this.makeControls();
    this.choose(this.data.start);
    this.listen();
    new ResizeObserver(() => {
      const width = this.plot.clientWidth;
      if (width && !this.paper && width !== this.width) this.draw();
    }).observe(this.plot);
  }

  makeControls() {
    const { panels } = this.data;
    if (panels.length > 1) {
      const label = node("label", { class: "choice" }, this.controls, "Show ");
      this.select = node("select", {}, label);
      panels.forEach((panel, place) => {
        node("option", { value: place }, this.select, this.name_of(panel));
      });
      this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
    }
    const button = (text, label, action) => {
      const made = node("button", { type: "button", "aria-label": label, title: label },
        this.controls, text);
      made.addEventListener("click", action);
      return made;
    };
    this.buttons = {
      closer: button("+", "Zoom in", () => this.zoom(0.5)),
      wider: button("−", "Zoom out", () => this.zoom(2)),
      all: button("All", "All: show the whole range", () => this.look(null)),
      logX: button("log x", "log x: logarithmic horizontal axis", () => this.turn("logX")),
      logY: button("log y", "log y: logarithmic vertical axis", () => this.turn("logY")),
      bands: button("bands", "bands: from the lowest to the highest",
        () => this.turn("bands")),
    };
  }

  name_of(panel) {
    return panel.group ? `${panel.group}: ${panel.label}` : panel.label;
  }

  choose(place) {
    if (this.select) this.select.value = place;
    this.panel = this.data.panels[place];
    const { series } = this.panel;
    this.hidden = new Set();
    this.view = null;
    this.cursor = null;
    this.logX = this.panel.log_x;
    this.logY = this.panel.log_y;
    this.bands = true;
    const all = (key) => series.flatMap((one) => one[key]).filter((value) => value !== null);
    this.can = {
      logX: !this.panel.names.length && all("x").length > 0 && Math.min(...all("x")) > 0,
      logY: all("y").some((value) => value > 0)
        && series.every((one) => one.kind !== "strokes"),
      bands: series.some((one) => one.low.length),
    };
    for (const [name, able] of Object.entries(this.can)) this.buttons[name].hidden = !able;
    this.makeLegend();
    const keys = "Arrow keys read values, plus and minus zoom, Shift and arrows move, 0 shows all.";
    const title = this.data.panels.length > 1
      ? `${this.data.title}: ${this.name_of(this.panel)}` : this.data.title;
    this.plot.setAttribute("aria-label",
      `${title}. ${this.panel.y_label} against ${this.panel.x_label}. ${this.panel.note} ${keys}`);
    this.note.textContent = this.panel.note;
    this.note.hidden = !this.panel.note;
    this.said.textContent = "";
    this.tip.hidden = true;
    if (this.details.open) this.fillTable();
    this.draw();
  }

  makeLegend() {
    this.legend.replaceChildren();
    node("legend", { class: "unseen" }, this.legend, "Series shown");
    this.panel.series.forEach((series, place) => {
      const label = node("label", {}, this.legend);
      const box = node("input", { type: "checkbox" }, label);
      box.checked = true;
      const swatch = shape("svg", { class: "swatch", viewBox: "0 0 28 12", "aria-hidden": "true" },
        label);
      this.swatch(series, swatch);
      label.append(series.label);
      box.addEventListener("change", () => {
        if (box.checked) this.hidden.delete(place); else this.hidden.add(place);
        label.classList.toggle("off", !box.checked);
        this.draw();
      });
    });
    if (this.panel.series.length > 5) {
      for (const [text, checked] of [["all", true], ["none", false]]) {
        const made = node("button", { type: "button" }, this.legend, text);
        made.setAttribute("aria-label", checked ? "all series shown" : "none of the series shown");
        made.addEventListener("click", () => {
          for (const box of this.legend.querySelectorAll("input")) {
            if (box.checked !== checked) box.click();
          }
        });
      }
    }
  }

  swatch(series, parent) {
    const look = this.look_of(series);
    if (series.kind === "bars") {
      shape("rect", { x: 4, y: 1, width: 20, height: 10, class: `${look.class} filled` }, parent);
    } else if (series.kind === "points") {
      this.marker(series, 14, 6, parent, look);
    } else {
      shape("line", { x1: 1, x2: 27, y1: 6, y2: 6, ...look }, parent);
    }
  }

  look_of(series) {
    return {
      class: `stroke c${series.colour % COLOURS}${series.strong ? " strong" : ""}`,
      "stroke-dasharray": DASHES[series.dash % DASHES.length],
    };
  }

  marker(series, x, y, parent, look) {
    const size = 4;
    const paths = [
      `M${x - size},${y}a${size},${size} 0 1,0 ${2 * size},0a${size},${size} 0 1,0 ${-2 * size},0Z`,
      `M${x - size},${y - size}h${2 * size}v${2 * size}h${-2 * size}Z`,
      `M${x},${y - 5}L${x + 5},${y + 4}H${x - 5}Z`,
      `M${x},${y - 5.5}L${x + 5.5},${y}L${x},${y + 5.5}L${x - 5.5},${y}Z`,
      `M${x},${y + 5}L${x + 5},${y - 4}H${x - 5}Z`,
    ];
    const path = paths[series.colour % paths.length];
    shape("path", { d: path, class: `${look.class} marker` }, parent);
  }

  // ---- what is seen ----

  visible() {
    return this.panel.series.filter((_, place) => !this.hidden.has(place));
  }

  range() {
    const series = this.visible();
    const stretch = (one) => (one.kind === "steps" || one.kind === "bars") && one.x.length
      ? [one.x[one.x.length - 1] + this.width_of(one)] : [];
    const usableX = (value) => !this.logX || value > 0;
    const usableY = (value) => value !== null && (!this.logY || value > 0);
    let xs = series.flatMap((one) => [...one.x, ...stretch(one)]).filter(usableX);
    xs.push(...this.panel.marks.filter((mark) => mark.axis === "x" && usableX(mark.at))
      .map((mark) => mark.at));
    if (!xs.length) xs = [this.logX ? 1 : 0, 1];
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    if (this.panel.names.length) [x0, x1] = [-0.5, this.panel.names.length - 0.5];
    if (this.view) [x0, x1] = [this.view.x0, this.view.x1];
    const ys = [];
    for (const one of series) {
      one.x.forEach((x, place) => {
        const right = one.kind === "bars" || one.kind === "steps" ? x + this.width_of(one) : x;
        if (right < x0 || x > x1) return;
        ys.push(one.y[place]);
        if (this.bands && one.low.length) ys.push(one.low[place], one.high[place]);
      });
      if (one.kind === "bars" && !this.logY) ys.push(0);
    }
    let used = ys.filter(usableY);
    used.push(...this.panel.marks.filter((mark) => mark.axis === "y" && usableY(mark.at))
      .map((mark) => mark.at));
    if (!used.length) used = [this.logY ? 1 : 0, this.logY ? 10 : 1];
    let [y0, y1] = [Math.min(...used), Math.max(...used)];
    if (series.every((one) => one.kind === "strokes")) [y0, y1] = [0, 1];
    else if (this.view && this.view.y0 !== undefined) [y0, y1] = [this.view.y0, this.view.y1];
    else [y0, y1] = this.padded(y0, y1, this.logY, 0.05, !this.logY && Math.min(...used) === 0);
    if (!this.view && !this.panel.names.length) [x0, x1] = this.padded(x0, x1, this.logX, 0.015);
    return { x: scale(x0, x1, this.logX), y: scale(y0, y1, this.logY) };
  }

  padded(low, high, log, share, floor = false) {
    if (log) {
      const by = Math.max((high / low) ** share, 1.02);
      return [low / by, high * by];
    }
    const by = (high - low || Math.abs(high) || 1) * share;
    return [floor ? low : low - by, high + by];
  }

  width_of(series) {
    return series.x.length > 1 ? series.x[1] - series.x[0] : 1;
  }

  draw() {
    this.width = this.paper || this.plot.clientWidth || 640;
    const narrow = this.width < 480;
    const strokes = this.visible().length > 0
      && this.visible().every((one) => one.kind === "strokes");
    const height = strokes ? 120 : Math.round(Math.min(420, Math.max(250, this.width * 0.5)));
    this.height = height;
    const long = this.panel.names.length ? this.panel.names.map((name) => name.length) : [];
    const turned = long.length > 0 && Math.max(...long) * 6.5 * long.length > this.width - 80;
    const bottom = turned ? Math.min(130, 40 + Math.max(...long) * 5.4) : 46;
    this.box = {
      left: strokes ? 12 : narrow ? 50 : 62, right: 12, top: 14, bottom,
    };
    this.box.w = this.width - this.box.left - this.box.right;
    this.box.h = height - this.box.top - this.box.bottom;
    this.scales = this.range();
    const { x, y } = this.scales;
    this.px = (value) => this.box.left + x.at(value) * this.box.w;
    this.py = (value) => this.box.top + (1 - y.at(value)) * this.box.h;

    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    svg.setAttribute("aria-hidden", "true");
    const clip = `${this.figure.id}-clip`;
    const clipping = shape("clipPath", { id: clip }, shape("defs", {}, svg));
    shape("rect", { x: this.box.left, y: this.box.top, width: this.box.w, height: this.box.h },
      clipping);
    this.axes(svg, strokes, turned);
    const inside = shape("g", { "clip-path": `url(#${clip})` }, svg);
    this.marks(inside, svg);
    const order = this.visible().slice().sort((a, b) =>
      (a.kind === "bars" ? 0 : 1) - (b.kind === "bars" ? 0 : 1) || a.strong - b.strong);
    for (const one of order) this.band(one, inside);
    for (const one of order) this.curve(one, inside);
    this.over = shape("g", { class: "over" }, svg);
    this.plot.replaceChildren(svg);
    for (const name of ["logX", "logY", "bands"]) {
      this.buttons[name].setAttribute("aria-pressed", String(this[name]));
    }
    this.buttons.all.disabled = !this.view;
    this.point(this.cursor);
  }

  axes(svg, strokes, turned) {
    const { left, top, w, h } = this.box;
    const grid = shape("g", { class: "grid" }, svg);
    const text = shape("g", { class: "ticks" }, svg);
    const { x, y } = this.scales;
    if (this.panel.names.length) {
      const step = Math.ceil(this.panel.names.length / Math.max(1, Math.floor(w / 14)));
      this.panel.names.forEach((name, place) => {
        const at = this.px(place);
        if (place % step || at < left || at > left + w) return;
        shape("line", { x1: at, x2: at, y1: top, y2: top + h, class: "minor" }, grid);
        if (turned) {
          shape("text", { x: at, y: top + h + 8, "text-anchor": "end", dy: "0.3em",
            transform: `rotate(-55 ${at} ${top + h + 8})` }, text, name);
        } else {
          shape("text", { x: at, y: top + h + 17, "text-anchor": "middle" }, text, name);
        }
      });
    } else {
      const count = Math.max(2, Math.floor(w / 75));
      const ticks = x.log ? logTicks(x.low, x.high, count)
        : linearTicks(x.low, x.high, count, this.panel.whole);
      for (const tick of ticks) {
        const at = this.px(tick.at);
        shape("line", { x1: at, x2: at, y1: top, y2: top + h, class: tick.major ? "" : "minor" },
          grid);
        if (tick.major) {
          shape("text", { x: at, y: top + h + 17, "text-anchor": "middle" }, text, shown(tick.at));
        }
      }
    }
    if (!strokes) {
      const count = Math.max(2, Math.floor(h / 45));
      const ticks = y.log ? logTicks(y.low, y.high, count)
        : linearTicks(y.low, y.high, count, false);
      for (const tick of ticks) {
        const at = this.py(tick.at);
        shape("line", { x1: left, x2: left + w, y1: at, y2: at,
          class: tick.major ? "" : "minor" }, grid);
        if (tick.major) {
          shape("text", { x: left - 7, y: at, dy: "0.32em", "text-anchor": "end" }, text,
            shown(tick.at));
        }
      }
      const middle = top + h / 2;
      shape("text", { x: 13, y: middle, "text-anchor": "middle", class: "title",
        transform: `rotate(-90 13 ${middle})` }, text, this.panel.y_label);
      shape("line", { x1: left, x2: left, y1: top, y2: top + h, class: "axis" }, grid);
    }
    shape("line", { x1: left, x2: left + w, y1: top + h, y2: top + h, class: "axis" }, grid);
    shape("text", { x: left + w / 2, y: this.height - 6, "text-anchor": "middle", class: "title" },
      text, this.panel.x_label);
  }

  marks(inside, svg) {
    const { left, top, w, h } = this.box;
    for (const mark of this.panel.marks) {
      const along = mark.axis === "x";
      if (mark.at <= 0 && (along ? this.logX : this.logY)) continue;
      const at = along ? this.px(mark.at) : this.py(mark.at);
      const inX = along && at >= left && at <= left + w;
      const inY = !along && at >= top && at <= top + h;
      if (!inX && !inY) continue;
      shape("line", along ? { x1: at, x2: at, y1: top, y2: top + h, class: "mark" }
        : { x1: left, x2: left + w, y1: at, y2: at, class: "mark" }, inside);
      if (along) {
        const end = at > left + w / 2;
        shape("text", { x: at + (end ? -5 : 5), y: top + 11, class: "mark-text",
          "text-anchor": end ? "end" : "start" }, svg, mark.label);
      } else {
        shape("text", { x: left + w - 4, y: at - 4, class: "mark-text", "text-anchor": "end" },
          svg, mark.label);
      }
    }
  }

  usable(series, place, key = "y") {
    const value = series[key][place];
    return value !== null && value !== undefined && (!this.logY || value > 0)
      && (!this.logX || series.x[place] > 0);
  }

  band(series, parent) {
    if (!this.bands || !series.low.length) return;
    const places = series.x.map((_, place) => place)
      .filter((place) => this.usable(series, place, "high"));
    const floor = this.scales.y.low;
    const lower = (place) => this.usable(series, place, "low") ? series.low[place] : floor;
    if (places.length === 1 || series.kind === "points") {
      for (const place of places) {
        const at = this.px(series.x[place]) + this.shift(series);
        shape("line", { x1: at, x2: at, y1: this.py(lower(place)), y2: this.py(series.high[place]),
          class: `stroke c${series.colour % COLOURS}` }, parent);
      }
      return;
    }
    const up = places.map((place) => `${this.px(series.x[place])},${this.py(series.high[place])}`);
    const down = places.reverse()
      .map((place) => `${this.px(series.x[place])},${this.py(lower(place))}`);
    shape("polygon", { points: [...up, ...down].join(" "), class: `band c${series.colour % COLOURS}` },
      parent);
  }

  // Points over names stand side by side.
  shift(series) {
    if (!this.panel.names.length) return 0;
    const points = this.panel.series.filter((one) => one.kind === "points");
    const room = Math.min(12, this.box.w / this.panel.names.length / (points.length + 1));
    return (points.indexOf(series) - (points.length - 1) / 2) * room;
  }

  curve(series, parent) {
    const look = this.look_of(series);
    if (series.kind === "points") {
      series.x.forEach((x, place) => {
        if (this.usable(series, place)) {
          this.marker(series, this.px(x) + this.shift(series), this.py(series.y[place]), parent,
            look);
        }
      });
      return;
    }
    if (series.kind === "strokes") {
      const path = [];
      let last = null;
      for (const x of series.x) {
        if (this.logX && x <= 0) continue;
        const at = Math.round(this.px(x) * 4) / 4;
        if (at !== last && at >= 0 && at <= this.width) path.push(`M${at},${this.box.top}V${this.box.top + this.box.h}`);
        last = at;
      }
      shape("path", { d: path.join(""), class: `${look.class} stick` }, parent);
      return;
    }
    const stepped = series.kind === "steps" || series.kind === "bars";
    const wide = stepped ? this.width_of(series) : 0;
    const bottom = this.box.top + this.box.h;
    const base = this.logY ? bottom : Math.min(bottom, this.py(0));
    let path = "";
    let down = true;
    series.x.forEach((x, place) => {
      const able = this.usable(series, place);
      if (stepped) {
        const [a, b] = [this.px(x), this.px(x + wide)];
        const level = able ? this.py(series.y[place]) : base;
        path += down ? `M${a},${base}V${level}H${b}` : `V${level}H${b}`;
        down = false;
      } else if (able) {
        path += `${down ? "M" : "L"}${this.px(x)},${this.py(series.y[place])}`;
        down = false;
      } else {
        down = true;
      }
    });
    if (stepped) path += `V${base}`;
    const extra = series.kind === "bars" ? " filled" : "";
    shape("path", { d: path, ...look, class: `${look.class}${extra}` }, parent);
    if (!stepped && series.x.length === 1) {
      this.marker(series, this.px(series.x[0]), this.py(series.y[0]), parent, look);
    }
  }

  // ---- reading values ----

  places() {
    const all = new Set();
    for (const one of this.visible()) {
      const shift = one.kind === "bars" || one.kind === "steps" ? this.width_of(one) / 2 : 0;
      for (const x of one.x) if (!this.logX || x > 0) all.add(x + shift);
    }
    const { low, high } = this.scales.x;
    return [...all].filter((x) => x >= low && x <= high).sort((a, b) => a - b);
  }

  values(x) {
    const found = [];
    for (const one of this.visible()) {
      let place;
      if (one.kind === "bars" || one.kind === "steps") {
        const wide = this.width_of(one);
        place = one.x.findIndex((left) => left <= x && x < left + wide);
      } else {
        place = one.x.indexOf(x);
      }
      if (place < 0 || one.kind !== "strokes" && one.y[place] === null) continue;
      found.push({ series: one, place });
    }
    return found;
  }

  said_of({ series, place }) {
    if (series.kind === "strokes") return "";
    const [value, low, high] = [series.y[place], series.low[place], series.high[place]];
    const spread = low !== undefined && low !== null && low !== high
      ? ` (${shown(low)} to ${shown(high)})` : "";
    return `${shown(value)}${spread}`;
  }

  title_of(x) {
    return this.panel.names.length ? this.panel.names[Math.round(x)]
      : `${this.panel.x_label}: ${shown(x, 6)}`;
  }

  point(x, aloud = false) {
    this.cursor = x;
    this.over.replaceChildren();
    if (x === null) {
      this.tip.hidden = true;
      return;
    }
    const at = this.px(x);
    const { left, top, w, h } = this.box;
    if (at < left - 1 || at > left + w + 1) {
      this.tip.hidden = true;
      return;
    }
    shape("line", { x1: at, x2: at, y1: top, y2: top + h, class: "cursor" }, this.over);
    const found = this.values(x);
    for (const one of found) {
      if (one.series.kind === "line" && this.usable(one.series, one.place)) {
        this.marker(one.series, at, this.py(one.series.y[one.place]), this.over,
          this.look_of(one.series));
      }
    }
    found.sort((a, b) => (b.series.y[b.place] ?? 0) - (a.series.y[a.place] ?? 0));
    this.tip.replaceChildren();
    node("strong", {}, this.tip, this.title_of(x));
    for (const one of found.slice(0, SHOWN_IN_TIP)) {
      const line = node("div", {}, this.tip);
      const swatch = shape("svg", { class: "swatch", viewBox: "0 0 28 12" }, line);
      this.swatch(one.series, swatch);
      node("span", {}, line, one.series.label);
      node("b", {}, line, this.said_of(one));
    }
    if (found.length > SHOWN_IN_TIP) {
      node("div", {}, this.tip, `and ${found.length - SHOWN_IN_TIP} more`);
    }
    this.tip.hidden = false;
    const share = this.frame.clientWidth / this.width;
    const beside = at * share;
    const room = this.tip.offsetWidth + 14;
    const fits = beside + room < this.frame.clientWidth;
    this.tip.style.left = `${fits ? beside + 14 : Math.max(0, beside - room)}px`;
    this.tip.style.top = `${top + 6}px`;
    if (aloud) {
      const words = found.map((one) => `${one.series.label} ${this.said_of(one)}`);
      this.said.textContent = `${this.title_of(x)}; ${words.join("; ")}`;
    }
  }

  nearest(clientX) {
    const outline = this.plot.getBoundingClientRect();
    const at = (clientX - outline.left) * (this.width / outline.width);
    let best = null;
    let distance = Infinity;
    for (const x of this.places()) {
      const away = Math.abs(this.px(x) - at);
      if (away < distance) [best, distance] = [x, away];
    }
    return best;
  }

  // ---- moving ----

  look(view) {
    this.view = view;
    this.draw();
  }

  turn(name) {
    this[name] = !this[name];
    if (name !== "bands") this.view = null;
    this.draw();
  }

  zoom(factor) {
    const { x } = this.scales;
    const centre = this.cursor === null ? 0.5 : Math.min(1, Math.max(0, x.at(this.cursor)));
    this.reach(centre - centre * factor, centre + (1 - centre) * factor);
  }

  pan(share) {
    this.reach(share, 1 + share);
  }

  reach(first, last) {
    const { x } = this.scales;
    const view = { x0: x.from(first), x1: x.from(last) };
    this.view = null;
    const whole = this.range().x;
    if (view.x0 <= whole.low && view.x1 >= whole.high) {
      this.draw();
      return;
    }
    this.look(view);
  }

  step(by) {
    const places = this.places();
    if (!places.length) return;
    let next;
    if (by === "first") next = 0;
    else if (by === "last") next = places.length - 1;
    else {
      const at = this.cursor === null ? (by > 0 ? -1 : places.length)
        : places.findIndex((x) => x >= this.cursor);
      next = Math.min(places.length - 1, Math.max(0, at + by));
    }
    this.point(places[next], true);
  }

  key(event) {
    const actions = {
      ArrowLeft: () => event.shiftKey ? this.pan(-0.2) : this.step(-1),
      ArrowRight: () => event.shiftKey ? this.pan(0.2) : this.step(1),
      Home: () => this.step("first"),
      End: () => this.step("last"),
      "+": () => this.zoom(0.5),
      "=": () => this.zoom(0.5),
      "-": () => this.zoom(2),
      0: () => this.look(null),
      Escape: () => this.point(null),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }

  listen() {
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.point(null));
    this.plot.addEventListener("dblclick", () => this.look(null));
    this.plot.addEventListener("pointerleave", () => {
      if (!this.drag) this.point(null);
    });
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) {
        this.drag = this.place(event);
        this.plot.setPointerCapture(event.pointerId);
      } else {
        this.point(this.nearest(event.clientX));
      }
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.drag) {
        this.point(this.nearest(event.clientX));
        return;
      }
      const corners = this.corners(event);
      this.over.replaceChildren();
      this.tip.hidden = true;
      shape("rect", { class: "choose", x: corners.x0, y: corners.y0,
        width: corners.x1 - corners.x0, height: corners.y1 - corners.y0 }, this.over);
    });
    const end = (event) => {
      if (!this.drag) return;
      const { x0, x1, y0, y1 } = this.corners(event);
      this.drag = null;
      if (event.type === "pointercancel" || x1 - x0 < 6) {
        this.over.replaceChildren();  // no more: a second click must find what the first did
        return;
      }
      const { left, top, w, h } = this.box;
      const { x, y } = this.scales;
      const view = { x0: x.from((x0 - left) / w), x1: x.from((x1 - left) / w) };
      if (y1 - y0 < h) {
        view.y0 = y.from(1 - (y1 - top) / h);
        view.y1 = y.from(1 - (y0 - top) / h);
      }
      this.cursor = null;
      this.look(view);
    };
    this.plot.addEventListener("pointerup", end);
    this.plot.addEventListener("pointercancel", end);
  }

  place(event) {
    const outline = this.plot.getBoundingClientRect();
    const share = this.width / outline.width;
    const { left, top, w, h } = this.box;
    return {
      x: Math.min(left + w, Math.max(left, (event.clientX - outline.left) * share)),
      y: Math.min(top + h, Math.max(top, (event.clientY - outline.top) * share)),
    };
  }

  // A flat rectangle means: this stretch of x, whatever y.
  corners(event) {
    const end = this.place(event);
    const { top, h } = this.box;
    const flat = Math.abs(end.y - this.drag.y) < 14;
    return {
      x0: Math.min(this.drag.x, end.x), x1: Math.max(this.drag.x, end.x),
      y0: flat ? top : Math.min(this.drag.y, end.y),
      y1: flat ? top + h : Math.max(this.drag.y, end.y),
    };
  }

  // ---- the same as a table ----

  fillTable() {
    const into = this.details.querySelector(".scroll");
    if (!this.details.open) return;
    const { series, names, x_label: along, y_label: up } = this.panel;
    const rows = new Map();
    series.forEach((one, column) => one.x.forEach((x, place) => {
      if (!rows.has(x)) rows.set(x, {});
      rows.get(x)[column] = this.said_of({ series: one, place }) || "•";
    }));
    const table = node("table");
    node("caption", {}, table, `${up} against ${along}`);
    const head = node("tr", {}, node("thead", {}, table));
    node("th", { scope: "col" }, head, names.length ? "name" : along);
    for (const one of series) node("th", { scope: "col" }, head, one.label);
    const body = node("tbody", {}, table);
    for (const x of [...rows.keys()].sort((a, b) => a - b)) {
      const row = node("tr", {}, body);
      node("th", { scope: "row" }, row, names.length ? names[x] : shown(x, 6));
      series.forEach((_, column) => node("td", {}, row, rows.get(x)[column] ?? ""));
    }
    into.replaceChildren(table);
  }
}

// ---- the page ----------------------------------------------------------------------------------

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  figure.plot = new Plot(figure);
}

// On paper the page is as wide as the paper, whatever the window is.
const PAPER = 690;
const plots = () => [...document.querySelectorAll("figure[data-chart]")].map((one) => one.plot);
function printing(width) {
  for (const one of plots()) {
    one.paper = width;
    one.draw();
  }
}
window.addEventListener("beforeprint", () => printing(PAPER));
window.addEventListener("afterprint", () => printing(null));

const theme = document.getElementById("theme");
theme.closest("label").hidden = false;
theme.addEventListener("change", () => {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
});
