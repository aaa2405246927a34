"""Style of the page: light and dark, wide and narrow screens, paper. No fonts or files from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #525e6e; --line: #d9dee5; --accent: #0b5fa5;
  --plain: #eaf3fb; --plain-line: #0b5fa5; --warn: #8a3b00; --warn-page: #fff3e6; --stripe: #f4f6f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --text: #e7ebf0; --soft: #a9b4c2; --line: #343d4a; --accent: #7cc0ff;
    --plain: #14283a; --plain-line: #7cc0ff; --warn: #ffbf85; --warn-page: #34230f; --stripe: #202833;
  }
  img.chart { filter: invert(0.89) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 1.4rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1rem 0 .3rem; color: var(--soft); }
p, ul { margin: .45rem 0; max-width: 50rem; }
ul { padding-left: 1.3rem; }
li { margin: .2rem 0; }
a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.25rem; margin: 1.1rem 0; }
section.plain { background: var(--plain); border-left: 5px solid var(--plain-line); font-size: 1.03rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; }
nav ul { margin: .8rem 0 0; max-width: none; }
.soft, figcaption, caption, .range { color: var(--soft); }
.soft, figcaption { font-size: .88rem; }
.range { display: block; font-size: .82rem; }
.missing { color: var(--soft); font-style: italic; border-left: 3px solid var(--line); padding-left: .7rem; }
.warning { color: var(--warn); background: var(--warn-page); border-radius: 6px; }
.warning { padding: .5rem .75rem; font-weight: 600; }
.headline { display: flex; align-items: center; gap: .8rem; }
.big { font-size: 2.6rem; font-weight: 700; line-height: 1.1; }
.badge {
  display: inline-block; min-width: 1.5em; padding: 0 .35em; margin-right: .45em; border-radius: 5px; color: #fff;
  font-size: .85em; font-weight: 700; text-align: center; line-height: 1.5;
}
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .92rem; min-width: 20rem; }
caption { text-align: left; font-size: .88rem; padding-bottom: .4rem; }
caption span { display: block; max-width: min(50rem, 80vw); }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--stripe); }
tr.group th { background: var(--card); font-weight: 700; padding-top: .9rem; border-bottom: 2px solid var(--line); }
.numbers td { white-space: nowrap; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
td.changed, .changed { font-weight: 700; color: var(--accent); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .9rem 1.2rem; }
.cases { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.6rem; }
.cases figure, .cases > div > div { margin-bottom: 1rem; }
.large { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .9rem 1.2rem; }
figure { margin: .3rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; }
img.chart { background: #fff; border-radius: 6px; }
img.photo { border-radius: 6px; background: #000; width: 100%; }
.legend { display: inline-block; width: 1.6em; border-top: 3px solid; margin: 0 .35em .25em 0; vertical-align: middle; }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--accent); }
footer { padding-bottom: 2.5rem; }
@media (max-width: 40rem) {
  header, main, footer { padding-left: .7rem; padding-right: .7rem; }
  header { padding-top: 1.1rem; }
  section { padding: .9rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .3rem .5rem; }
}
@media print {
  :root {
    color-scheme: light; --page: #fff; --card: #fff; --text: #000; --soft: #444; --line: #bbb; --accent: #000;
    --plain: #fff; --plain-line: #000; --warn: #000; --warn-page: #fff; --stripe: #fff;
  }
  img.chart { filter: none; }
  body { font-size: 10pt; }
  header, main, footer { max-width: none; padding: 0; }
  section { border: 0; border-top: 1px solid #bbb; border-radius: 0; padding: .6rem 0; }
  section.plain { border: 2px solid #000; padding: .6rem; }
  nav { display: none; }
  h2, h3, h4 { break-after: avoid; }
  tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  .badge { border: 1px solid #000; }
}
"""

SCRIPT = 'addEventListener("beforeprint",()=>document.querySelectorAll("details").forEach(d=>{d.open=true}));'

COLOURS = ("#0072b2", "#b84a00", "#007a59", "#9c4a7b", "#6b5b00", "#3d5a80", "#8b1e3f", "#4a4a4a")
"""Of models or folds: told apart by colour-blind readers, and dark enough for white letters upon them."""
