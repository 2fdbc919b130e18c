"use strict";
// Unpacks Plotly and draws the figures in the page's own colours, light, dark or for paper.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const settings = { responsive: true, displayModeBar: false, displaylogo: false };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  }

  // Every CSS variable that a figure names as a colour becomes that colour.
  function filled(value, colour) {
    if (typeof value === "string") {
      const found = /^var\((--[\w-]+)\)$/.exec(value);
      return found ? colour(found[1]) : value;
    }
    if (Array.isArray(value)) return value.map((item) => filled(item, colour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, colour)]));
    }
    return value;
  }

  function layoutOf(given, colour, width) {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: colour("--ink") },
      margin: { l: 8, r: 8, t: 8, b: 8 },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      dragmode: width < 700 ? false : "zoom",
      ...filled(given, colour),
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...axis, ...layout[key] };
    }
    return layout;
  }

  function draw() {
    const colour = colours();
    for (const [id, figure] of Object.entries(figures)) {
      const place = document.getElementById(id);
      Plotly.react(place, filled(figure.data, colour), layoutOf(figure.layout, colour, innerWidth), settings);
    }
    document.documentElement.dataset.drawn = "yes";
  }

  async function unpack() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function withoutCharts() {
    for (const place of document.querySelectorAll(".plot")) place.hidden = true;
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") return withoutCharts();
    await unpack();
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    matchMedia("print").addEventListener("change", draw);
    addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  }

  start();
})();
