"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const PAPER_PX = 660;
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const chosen = {};
  let printing = false;

  // "var(--name)" in a figure stands for the page's colour of that name, light or dark.
  const coloured = (value, style) => {
    if (typeof value === "string") {
      const match = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return match ? style.getPropertyValue(match[1]).trim() || value : value;
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
    }
    return value;
  };

  const draw = (key) => {
    const figure = figures[key];
    const choice = figure.choices[chosen[key] || 0];
    const layout = { ...figure.layout, ...(choice ? choice.layout : {}) };
    if (printing) layout.width = Math.min(PAPER_PX, document.documentElement.clientWidth || PAPER_PX);
    const style = getComputedStyle(document.documentElement);
    Plotly.react(key, coloured(choice ? choice.data : figure.data, style), coloured(layout, style), options);
  };
  const drawAll = () => Object.keys(figures).forEach(draw);

  document.querySelectorAll("select[data-figure]").forEach((select) => {
    select.value = "0";
    select.addEventListener("change", () => {
      chosen[select.dataset.figure] = Number(select.value);
      draw(select.dataset.figure);
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // On paper: no dark colours, no figure wider than the page, nothing folded away.
  let opened = [];
  addEventListener("beforeprint", () => {
    printing = true;
    document.documentElement.dataset.printing = "true"; // light colours from here on, though the screen's still apply
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => { details.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    delete document.documentElement.dataset.printing;
    opened.forEach((details) => { details.open = false; });
    drawAll();
  });
  drawAll();
  document.documentElement.dataset.drawn = "true";
})();
