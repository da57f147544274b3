(() => {
  "use strict";

  const root = document.documentElement;
  const text = document.getElementById("data").textContent;
  const plain = JSON.parse(text);
  const darkColours = new Map(Object.entries(plain.dark));
  const darkSystem = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const touch = matchMedia("(pointer: coarse)");
  const canvases = [...document.querySelectorAll("[data-figure]")];
  const config = {
    displaylogo: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
    topojsonURL: "about:blank",
  };
  const NO_ROOM = 200; // px; a window on its way in or out has no room for a figure
  let drawnFor = "";
  let axis = "linear";
  let turns = 0;

  const isDark = () => (root.dataset.theme ?? (darkSystem.matches ? "dark" : "light")) === "dark";

  // Figures are made in light colours; on a dark page every colour is exchanged while they are read.
  function inTheme(figure) {
    if (!isDark()) return structuredClone(figure);
    return JSON.parse(JSON.stringify(figure), (_, value) => darkColours.get(value) ?? value);
  }

  function figureOf(canvas) {
    const name = canvas.dataset.figure;
    const point = document.getElementById("share-point");
    return plain.figures[name === "shares_by_class" && point ? `${name}:${point.value}` : name];
  }

  function draw(canvas) {
    const { data, layout } = inTheme(figureOf(canvas));
    const small = narrow.matches;
    delete layout.title; // the page's own heading says it
    layout.margin = { l: small ? 40 : 56, r: small ? 16 : 24, t: small ? 30 : 40, b: small ? 40 : 48 };
    layout.font = { size: small ? 11 : 13 };
    layout.modebar = { bgcolor: "transparent" };
    layout.dragmode = touch.matches ? false : "zoom"; // a finger scrolls the page
    if (canvas.dataset.figure === "front" && axis === "log") {
      layout.xaxis = { ...layout.xaxis, type: "log", tickvals: [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1] };
    }
    layout.width = canvas.clientWidth;
    canvas.style.height = `${layout.height}px`;
    return Plotly.react(canvas, data, layout, { ...config, displayModeBar: small || touch.matches ? false : "hover" });
  }

  async function drawAll() {
    const turn = (turns += 1);
    delete root.dataset.drawn;
    for (const canvas of canvases) {
      await draw(canvas);
      if (turn !== turns) return; // a later call has begun again
    }
    root.dataset.drawn = drawnFor;
  }

  // Draws when something that figures depend on has changed: theme, width, or kind of pointer.
  function refresh() {
    if (root.clientWidth < NO_ROOM) return;
    const wanted = `${isDark() ? "dark" : "light"} ${root.clientWidth}${touch.matches ? " touch" : ""}`;
    document.getElementById("theme").textContent = isDark() ? "Light" : "Dark";
    if (wanted === drawnFor) return;
    drawnFor = wanted;
    drawAll();
  }

  function setUpTheme() {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      refresh();
    });
    darkSystem.addEventListener("change", refresh);
    touch.addEventListener("change", refresh);
    let pause;
    addEventListener("resize", () => {
      clearTimeout(pause);
      pause = setTimeout(refresh, 100);
    });
  }

  function setUpAxis() {
    const group = document.querySelector(".switch");
    group.hidden = false;
    for (const button of group.children) {
      button.addEventListener("click", () => {
        axis = button.dataset.axis;
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        draw(canvases.find((canvas) => canvas.dataset.figure === "front"));
      });
    }
  }

  function row(tag, cells) {
    const line = document.createElement("tr");
    cells.forEach((content, k) => {
      const cell = document.createElement(tag === "th" || k === 0 ? "th" : "td");
      if (tag === "th" || k === 0) cell.scope = tag === "th" ? "col" : "row";
      cell.textContent = content;
      line.append(cell);
    });
    return line;
  }

  function fillClasses() {
    const table = document.getElementById("class-table");
    if (!table.open) return;
    const { rows } = plain.classShares[document.getElementById("share-point").value];
    const wanted = document.getElementById("class-filter").value.toLowerCase();
    const exits = Array.from({ length: plain.exits }, (_, k) => k + 1);
    table.querySelector("thead").replaceChildren(row("th", ["Class", "n", ...exits.map((k) => `exit ${k}`), "Main path"]));
    const lines = rows
      .filter(([name]) => name.toLowerCase().includes(wanted))
      .map(([name, n, shares]) => {
        const at = exits.map(() => 0);
        let main = "–";
        for (const [path, share] of Object.entries(shares)) {
          at[path.split("-").length - 1] += share;
          if (share > (shares[main] ?? 0)) main = path;
        }
        return row("td", [name, n, ...at.map((share) => (100 * share).toFixed(1)), main]);
      });
    table.querySelector("tbody").replaceChildren(...lines);
  }

  function setUpClasses() {
    const point = document.getElementById("share-point");
    if (!point) return;
    point.addEventListener("change", () => {
      draw(canvases.find((canvas) => canvas.dataset.figure === "shares_by_class"));
      fillClasses();
    });
    document.getElementById("class-filter").addEventListener("input", fillClasses);
    document.getElementById("class-table").addEventListener("toggle", fillClasses);
  }

  setUpTheme();
  setUpAxis();
  setUpClasses();
  refresh();
})();
