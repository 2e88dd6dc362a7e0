"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const make = (tag, set = {}, ...inside) => {
  const node = Object.assign(document.createElement(tag), set);
  node.append(...inside);
  return node;
};
const OUTLINE = "#ffd640", FIRST = "#ffa630", SECOND = "#60c8ff", HERE = "#ffffff";
const state = { run: data.start, image: 0, layer: 0, view: "kept", beside: null, token: null, column: 0, up: true };

const image = () => data.images[state.image];
const inside = () => told().stages.find(({ site, kept }, i, all) => site && kept < (i ? all[i - 1].kept : image().tokens))?.site ?? 0;
const told = (run = state.run) => data.runs[run].images[state.image];
const staysIn = (run, token, layer = state.layer) => {
  const { left, stages } = told(run);
  return left[token] < 0 || stages[left[token]].site > layer;
};
const leaves = token => {
  const { left, stages } = told();
  return left[token] < 0 ? Infinity : stages[left[token]].site;
};
const when = site => site === Infinity ? "stays" : site ? `before layer ${site}` : "before the LLM";
const number = value => value === null || value === undefined ? "-" : typeof value === "string" ? value : String(value);

// -- pictures

function toned(picture, light) {  // grey, and mixed with the shade where light is below 1
  const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
  const pen = canvas.getContext("2d");
  pen.drawImage(picture, 0, 0);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height), shade = [30, 32, 40];
  for (let i = 0; i < pixels.data.length; i += 4) {
    const grey = .299 * pixels.data[i] + .587 * pixels.data[i + 1] + .114 * pixels.data[i + 2];
    for (let c = 0; c < 3; c++) pixels.data[i + c] = light * grey + (1 - light) * shade[c];
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

async function load() {
  for (const each of data.images) {
    each.photos = await Promise.all(each.pictures.map(async source => {
      const picture = make("img", { src: source });
      await picture.decode();
      return { plain: picture, dim: toned(picture, .32), grey: toned(picture, 1) };
    }));
    each.at = new Map();
    each.panels.forEach((panel, place) => panel.tokens.forEach((token, cell) => each.at.set(token, [place, cell])));
  }
}

function colour(level) {
  return data.ramp[Math.min(data.ramp.length - 1, Math.floor(level * data.ramp.length))];
}

function paint(panel, canvas) {
  const photo = image().photos[panel.picture], pen = canvas.getContext("2d");
  const [width, height] = [canvas.width, canvas.height];
  const rows = panel.tokens.length / panel.columns;
  const [left, top, right, bottom] = panel.box.map((share, i) => share * (i % 2 ? height : width));
  const x = column => Math.round(left + (right - left) * column / panel.columns);
  const y = row => Math.round(top + (bottom - top) * row / rows);
  const side = Math.min((right - left) / panel.columns, (bottom - top) / rows);
  const fine = Math.max(1, Math.min(canvas.width / 150, Math.round(side / 11)));
  const place = cell => {
    const column = cell % panel.columns, row = (cell - column) / panel.columns;
    return [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
  };
  const clipped = (cells, source) => {
    pen.save();
    pen.beginPath();
    for (const cell of cells) pen.rect(...place(cell));
    pen.clip();
    pen.drawImage(source, 0, 0, width, height);
    pen.restore();
  };
  const line = (cells, stroke, thick, slot = () => 0) => {
    const inside = new Set(cells);
    pen.fillStyle = stroke;
    for (const cell of cells) {
      const [l, t, w, h] = place(cell), column = cell % panel.columns;
      const open = (other, there) => !there || !inside.has(other) || slot(other) !== slot(cell);
      if (open(cell - panel.columns, true)) pen.fillRect(l, t, w, thick);
      if (open(cell + panel.columns, true)) pen.fillRect(l, t + h - thick, w, thick);
      if (open(cell - 1, column > 0)) pen.fillRect(l, t, thick, h);
      if (open(cell + 1, column < panel.columns - 1)) pen.fillRect(l + w - thick, t, thick, h);
    }
  };
  const cells = [...panel.tokens.keys()];
  pen.drawImage(photo.dim, 0, 0, width, height);
  if (state.view === "scores") {
    const levels = scaled();
    const scored = cells.filter(cell => levels[panel.tokens[cell]] !== null);
    clipped(scored, photo.grey);
    pen.globalAlpha = .72;
    for (const cell of scored) {
      pen.fillStyle = colour(levels[panel.tokens[cell]]);
      pen.fillRect(...place(cell));
    }
    pen.globalAlpha = 1;
  } else {
    const mine = cells.filter(cell => staysIn(state.run, panel.tokens[cell]));
    if (state.beside === null) {
      const { merged } = told();
      const shown = merged && !state.layer ? cells.filter(cell => merged[panel.tokens[cell]] >= 0) : mine;
      clipped(shown, photo.plain);
      line(shown, OUTLINE, fine, merged && !state.layer ? cell => merged[panel.tokens[cell]] : undefined);
    } else {
      const theirs = cells.filter(cell => staysIn(state.beside, panel.tokens[cell]));
      const [a, b] = [new Set(mine), new Set(theirs)];
      clipped([...new Set([...mine, ...theirs])], photo.plain);
      line(mine.filter(cell => !b.has(cell)), FIRST, 2 * fine);
      const only = theirs.filter(cell => !a.has(cell));
      line(only, SECOND, 2 * fine);
      for (const cell of only) {
        const [l, t, w, h] = place(cell);
        pen.fillRect(l + w / 3, t + h / 3, w / 3, h / 3);
      }
    }
  }
  const here = panel.tokens.indexOf(state.token);
  if (here >= 0) {
    line([here], "#000000", 2 * fine);
    line([here], HERE, fine);
  }
  const staying = panel.tokens.filter(token => staysIn(state.run, token)).length;
  canvas.setAttribute("aria-label", `${panel.title || image().name}: ${staying} of ${panel.tokens.length} tokens stay`);
  if (canvas.nextSibling) canvas.nextSibling.textContent = `${panel.title}: ${staying} of ${panel.tokens.length}`;
}

function scaled() {
  const scores = told().scores;
  if (!scores) return image().panels.flatMap(panel => panel.tokens).map(() => null);
  const finite = scores.filter(score => typeof score === "number");
  const low = Math.min(...finite), span = Math.max(...finite) - low || 1;
  return scores.map(score => typeof score === "number" ? (score - low) / span : null);
}

function lay() {  // one canvas for each panel
  const box = get("panels");
  box.replaceChildren();
  box.classList.toggle("film", image().video);
  image().panels.forEach(panel => {
    const { naturalWidth: w, naturalHeight: h } = image().photos[panel.picture].plain;
    const scale = Math.max(1, Math.ceil(1000 / Math.max(w, h)));
    const canvas = make("canvas", { width: w * scale, height: h * scale, tabIndex: 0 });
    canvas.setAttribute("role", "img");
    const cellAt = event => {
      const seen = canvas.getBoundingClientRect(), rows = panel.tokens.length / panel.columns;
      const across = ((event.clientX - seen.left) / seen.width - panel.box[0]) / (panel.box[2] - panel.box[0]);
      const down = ((event.clientY - seen.top) / seen.height - panel.box[1]) / (panel.box[3] - panel.box[1]);
      if (across < 0 || across >= 1 || down < 0 || down >= 1) return null;
      return panel.tokens[Math.floor(down * rows) * panel.columns + Math.floor(across * panel.columns)];
    };
    canvas.addEventListener("pointermove", event => point(cellAt(event)));
    canvas.addEventListener("click", event => point(cellAt(event), true));
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -panel.columns, ArrowDown: panel.columns }[event.key];
      if (!step) return;
      event.preventDefault();
      const here = panel.tokens.indexOf(state.token);
      point(here < 0 ? panel.tokens[0] : panel.tokens[here + step] ?? state.token, true);
    });
    const several = image().panels.length > 1;
    box.append(make("figure", {}, canvas, ...(several ? [make("figcaption")] : [])));
  });
}

function key() {
  const entry = (stroke, text) => {
    const mark = make("i");
    mark.style.borderColor = stroke;
    return make("span", {}, mark, text);
  };
  const box = get("key");
  if (state.view === "scores") {
    const scores = (told().scores || []).filter(score => typeof score === "number");
    if (!scores.length) return box.replaceChildren("this method gives no scores");
    const bar = make("i", { className: "bar" });
    bar.style.background = `linear-gradient(to right, ${data.ramp.join(",")})`;
    return box.replaceChildren(make("span", {}, `${Math.min(...scores)} `, bar, `${Math.max(...scores)}`),
      "higher stays; dark: no score");
  }
  const all = [...image().at.keys()], mine = all.filter(token => staysIn(state.run, token));
  if (state.beside === null) {
    const where = get("layer") ? ` in layer ${state.layer}` : "";
    if (told().merged && !state.layer)
      return box.replaceChildren(entry(OUTLINE, `${mine.length} tokens, each made of the cells in its outline`), "dark: gone");
    return box.replaceChildren(entry(OUTLINE, `${mine.length} of ${all.length} tokens alive${where}`), "dark: gone");
  }
  const theirs = new Set(all.filter(token => staysIn(state.beside, token)));
  const both = mine.filter(token => theirs.has(token)).length;
  box.replaceChildren(
    entry(FIRST, `${mine.length - both} only ${data.runs[state.run].name}`),
    entry(SECOND, `${theirs.size - both} only ${data.runs[state.beside].name} (dotted)`),
    `${both} both: no line`);
}

// -- the fate of a token

function words(token) {
  const [place, cell] = image().at.get(token), panel = image().panels[place];
  const column = cell % panel.columns, row = (cell - column) / panel.columns;
  const { scores, merged } = told();
  const into = merged && merged[token] >= 0 && merged[token] !== token ? `, merged into token ${merged[token]}` : "";
  const title = panel.title ? `${panel.title}, ` : "";
  return { row, column, title, score: scores ? scores[token] : null, site: leaves(token), into };
}

function point(token, go = false) {
  if (token === null || token === undefined) return;
  if (token !== state.token) {
    get("trace").querySelector(".here")?.classList.remove("here");
    state.token = token;
    repaint();
  }
  const row = get(`t${token}`);
  row.classList.add("here");
  if (go) {
    const box = row.closest(".scroll");
    box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }
  const { title, row: down, column, score, site, into } = words(token);
  get("token").replaceChildren(make("strong", {}, `Token ${token}`), make("br"),
    `${title}row ${down}, column ${column}`, make("br"),
    `score ${number(score)}; ${site === Infinity ? "stays to the end" : `left ${when(site)}`}${into}`);
}

function trace() {
  const keys = [
    token => token, token => image().at.get(token)[0] * 1e6 + words(token).row, token => words(token).column,
    token => { const { score } = words(token); return { always: Infinity, never: -Infinity }[score] ?? score ?? NaN; },
    leaves,
  ];
  const of = keys[state.column], sign = state.up ? 1 : -1;
  const order = (a, b) => isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a === b ? 0 : a < b ? -1 : 1);
  const rows = [...image().at.keys()].map(token => [of(token), token]).sort((a, b) => order(a[0], b[0]) || a[1] - b[1]);
  get("trace").tBodies[0].replaceChildren(...rows.map(([, token]) => {
    const { row, column, score, site, title, into } = words(token);
    const cells = [token, `${title}${row}`, column, number(score), `${when(site)}${into}`].map(text => make("td", {}, text));
    const line = make("tr", { id: `t${token}`, className: token === state.token ? "here" : "" }, ...cells);
    line.addEventListener("pointerenter", () => point(token));
    line.addEventListener("click", () => point(token));
    return line;
  }));
}

// -- tokens per layer

function layers() {
  const { alive } = told(), box = get("layers"), [left, right, top, bottom] = [44, 298, 22, 108];
  box.toggleAttribute("hidden", !alive.length);
  if (!alive.length) return;
  const svg = (tag, set, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(set)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const most = image().tokens, step = (right - left) / alive.length;
  const y = count => bottom - (bottom - top) * count / most;
  const label = { "font-size": 11, fill: "var(--muted)" };
  const bars = alive.map((count, layer) => svg("rect", {
    x: left + (layer + .08) * step, width: .84 * step, y: y(count), height: Math.max(.5, bottom - y(count)),
    fill: "var(--accent)", "fill-opacity": get("layer") && layer !== state.layer ? .45 : 1,
  }));
  const every = Math.ceil(alive.length / 9);
  const marks = alive.flatMap((_, layer) => layer % every ? [] : [
    svg("text", { ...label, x: left + (layer + .5) * step, y: bottom + 13, "text-anchor": "middle" }, layer)]);
  const mean = alive.reduce((sum, count) => sum + count, 0) / alive.length;
  box.replaceChildren(
    svg("line", { x1: left, x2: right, y1: top, y2: top, stroke: "var(--line)" }),
    svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--line)" }),
    svg("text", { ...label, x: left - 6, y: top + 4, "text-anchor": "end" }, most),
    svg("text", { ...label, x: left - 6, y: bottom + 4, "text-anchor": "end" }, 0),
    svg("text", { ...label, x: 0, y: 11 }, `tokens per decoder layer, mean ${mean.toFixed(1)}`), ...bars, ...marks);
}

// -- controls

function repaint() {
  [...get("panels").querySelectorAll("canvas")].forEach((canvas, place) => paint(image().panels[place], canvas));
}

function show() {
  const run = data.runs[state.run];
  if (get("layer")) {
    get("layer").max = Math.max(0, run.layers - 1);
    get("layer").value = state.layer;
    const alive = [...image().at.keys()].filter(token => staysIn(state.run, token)).length;
    get("layer-name").textContent = `layer ${state.layer} of ${run.layers} reads ${alive} tokens`;
    get("layer").setAttribute("aria-valuetext", get("layer-name").textContent);
  }
  if (get("run-name")) {
    get("run-name").textContent = run.name;
    get("run").setAttribute("aria-valuetext", run.name);
  }
  if (get("answer")) {
    get("answer").textContent = run.answer ?? "-";
    get("answered-by").textContent = run.name;
  }
  document.querySelectorAll(".stages").forEach((table, place) => { table.hidden = place !== state.run; });
  get("runs").querySelectorAll("tbody tr").forEach((row, place) => row.classList.toggle("here", place === state.run + 1));
  key();
  layers();
  repaint();
}

const set = (id, event, change) => get(id)?.addEventListener(event, () => { change(get(id).value); });
set("run", "input", value => { state.run = +value; show(); trace(); if (state.token !== null) point(state.token); });
set("layer", "input", value => { state.layer = +value; show(); });
set("beside", "change", value => { state.beside = value === "" ? null : +value; show(); });
set("image", "change", value => { Object.assign(state, { image: +value, token: null }); get("token").replaceChildren("Point at a token."); lay(); show(); trace(); });
document.getElementsByName("view").forEach(button => button.addEventListener("change", () => {
  state.view = button.value;
  show();
}));
[...get("trace").tHead.rows[0].cells].forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  state.up = state.column === column ? !state.up : column !== 3;
  state.column = column;
  get("trace").querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
  trace();
}));
data.images.forEach((each, place) => get("image")?.append(make("option", { value: place }, each.name)));
data.runs.forEach((each, place) => get("beside")?.append(make("option", { value: place }, each.name)));
get("token").replaceChildren("Point at a token.");
state.layer = inside();
load().then(() => { lay(); show(); trace(); document.documentElement.dataset.ready = "yes"; });
