"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Map();

  // ---- light and dark: the system's, until the reader chooses

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (theme) => {
    root.dataset.theme = theme;
    for (const [element, figure] of drawn) Plotly.react(element, figure.data, layout(figure), CONFIG);
  };
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  // ---- charts, each drawn when it comes into view

  // Without a pointer the tool bar would always be shown, over the legend, and a drag would zoom instead of scroll.
  const pointer = window.matchMedia("(hover: hover)").matches;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    displayModeBar: pointer ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
  };
  const layout = (figure) => {
    const style = getComputedStyle(root);
    const [ink, faint, line] = ["--ink", "--faint", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: faint } };
    const own = structuredClone(figure.layout);
    for (const name of Object.keys(own)) if (/^[xy]axis/.test(name)) own[name] = { ...axis, ...own[name] };
    return {
      margin: { l: 48, r: own.yaxis2 ? 48 : 12, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      hovermode: "closest",
      dragmode: pointer ? "zoom" : false,
      ...own,
    };
  };
  const draw = (element) => {
    const figure = figures[element.dataset.figure];
    drawn.set(element, figure);
    Plotly.newPlot(element, structuredClone(figure.data), layout(figure), CONFIG);
  };
  setTheme(dark.matches ? "dark" : "light");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "400px" });
  for (const element of document.querySelectorAll(".plot")) seen.observe(element);

  // ---- captions: sort, filter, a page at a time

  const form = document.getElementById("controls");
  if (!form) return;
  const PAGE = 12;
  const list = document.getElementById("cards");
  const more = document.getElementById("more");
  const logged = [...list.children];
  const words = new Map(logged.map((card) => [card, card.textContent.toLowerCase()]));
  let shown = PAGE;

  const number = (card, name) => (card.dataset[name] === "" ? -Infinity : Number(card.dataset[name]));
  const ORDERS = {
    gain: (card) => number(card, "gain"),
    loss: (card) => (card.dataset.gain === "" ? -Infinity : -number(card, "gain")),
    tokens: (card) => number(card, "tokens"),
    spread: (card) => number(card, "spread"),
  };
  const update = () => {
    const { kind, sort, text } = Object.fromEntries(new FormData(form));
    const flags = ["masked", "no", "unjudged"].filter((name) => form.elements[name].checked);
    const wanted = (text || "").toLowerCase().split(/\s+/).filter(Boolean);
    const ofKind = logged.filter((card) => card.dataset.kind === kind);
    const matching = ofKind.filter((card) =>
      flags.every((flag) => card.dataset.flags.split(" ").includes(flag)) &&
      wanted.every((word) => words.get(card).includes(word)));
    if (ORDERS[sort]) {
      // Decorated first: a sort of equal values keeps the order of the log.
      const keys = new Map(matching.map((card) => [card, ORDERS[sort](card)]));
      matching.sort((a, b) => keys.get(b) - keys.get(a) || 0);
    }
    for (const card of logged) card.hidden = true;
    matching.slice(0, shown).forEach((card) => { card.hidden = false; });
    list.prepend(...matching);
    more.hidden = matching.length <= shown;
    document.getElementById("count").textContent = `${matching.length} of ${ofKind.length}`;
  };
  const kindChanged = () => {
    const group = form.elements.kind.value === "group";
    for (const option of form.elements.sort.options) {
      option.disabled = option.hidden = group ? ["gain", "loss"].includes(option.value) : option.value === "spread";
    }
    form.elements.sort.value = group ? "spread" : "gain";
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "kind") kindChanged();
    shown = PAGE;
    update();
  });
  more.addEventListener("click", () => { shown += PAGE; update(); });
  kindChanged();
  update();
})();
