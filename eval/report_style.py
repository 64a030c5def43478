"""How the page of a report looks: one style sheet, light and dark, wide and narrow.

Runs are told apart by the colour-blind too (Okabe and Ito 2008, made darker on white and lighter on black).
"""

SERIES = 8  # colours; the ninth run has the first one again
STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fcfcfa; --raised: #ffffff; --text: #1c2128; --quiet: #57606b; --line: #dfe2e6; --link: #0b5cad;
  --good: #0b7a4b; --bad: #b3261e; --right: #e8f4ee; --grid: #e3e6ea; --mark: #1c2128;
  --s0: #0072b2; --s1: #d55e00; --s2: #00835f; --s3: #b0518a; --s4: #5a6ac9;
  --s5: #946200; --s6: #4a4f57; --s7: #008a94;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --raised: #1c2026; --text: #e6e9ed; --quiet: #a3adb9; --line: #323941; --link: #7db8f5;
    --good: #5fd0a0; --bad: #ff8f85; --right: #1b3329; --grid: #2a3037; --mark: #e6e9ed;
    --s0: #56a8e0; --s1: #f08a45; --s2: #3fc196; --s3: #df8fbf; --s4: #9aa6f0;
    --s5: #d9a83d; --s6: #b4bac3; --s7: #4fc4cf;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
main { padding-bottom: 64px; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 56px 0 12px; font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.005em; }
h3 { margin: 24px 0 4px; font-size: 0.85rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.detail { margin: 6px 0 0; color: var(--quiet); overflow-wrap: anywhere; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.chip {
  display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 3px; background: var(--series);
}
.series-0 { --series: var(--s0); } .series-1 { --series: var(--s1); } .series-2 { --series: var(--s2); }
.series-3 { --series: var(--s3); } .series-4 { --series: var(--s4); } .series-5 { --series: var(--s5); }
.series-6 { --series: var(--s6); } .series-7 { --series: var(--s7); }

.heads {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); gap: 12px;
  margin: 24px 0 0; padding: 0; list-style: none;
}
.heads li {
  padding: 14px 16px; border: 1px solid var(--line); border-top: 3px solid var(--series); border-radius: 8px;
  background: var(--raised); font-variant-numeric: tabular-nums;
}
.heads .name { display: block; font-weight: 600; overflow-wrap: anywhere; }
.heads .value { display: block; margin-top: 2px; font-size: 2rem; line-height: 1.25; font-weight: 600; }
.heads .unit { font-size: 0.9375rem; font-weight: 400; color: var(--quiet); }
.heads .interval, .heads .change { display: block; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 24px 0 0; padding: 0; list-style: none; }

.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--raised); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { vertical-align: bottom; font-size: 0.875rem; }
tbody th { font-weight: 600; min-width: 210px; overflow-wrap: anywhere; }
thead th:first-child, tbody th[scope=row] { position: sticky; left: 0; background: var(--raised); }
.number { text-align: right; white-space: nowrap; }
.interval, .change, .how { color: var(--quiet); font-size: 0.8125rem; font-weight: 400; line-height: 1.4; }
td .interval, th .how, td .how { display: block; }
.published th, .published td, .grouped tbody th, .grouped td {
  padding-top: 5px; padding-bottom: 5px; font-weight: 400;
}
.grouped tbody th { min-width: 0; }
.grouped th, .grouped td { white-space: nowrap; }
th[scope=rowgroup], .grouped th[scope=rowgroup] {
  padding-top: 14px; font-size: 0.8125rem; font-weight: 600; color: var(--quiet); background: var(--page);
}
.grouped td .how { display: inline; margin-left: 6px; white-space: nowrap; }
.published .how { display: inline; margin-left: 6px; white-space: nowrap; }
sup { line-height: 0; margin-left: 2px; font-size: 0.7em; }
sup a { padding: 0 2px; text-decoration: none; }
.notes { margin: 16px 0 0; padding-left: 20px; max-width: 46rem; color: var(--quiet); font-size: 0.875rem; }
.notes li { margin: 3px 0; }
h3 + .notes { margin-top: 0; }

.legend {
  display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 16px; padding: 0; list-style: none; font-size: 0.875rem;
}
.legend li { display: flex; align-items: center; }
.sample { margin-right: 6px; }
.chart { font-variant-numeric: tabular-nums; }
.group { display: grid; grid-template-columns: 200px 1fr; gap: 12px; align-items: center; padding: 3px 0; }
.group svg { display: block; overflow: visible; }
.label { font-size: 0.875rem; text-align: right; line-height: 1.3; }
.label .how { display: block; }
.chart rect { fill: var(--series); }
@media (prefers-color-scheme: dark) { .chart rect { opacity: 0.7; } }
.chart text { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--grid); }
.whisker { stroke: var(--text); stroke-width: 1.5; }
.mark { stroke: var(--mark); stroke-width: 2; }
.mark-0 { stroke-dasharray: 2 3; } .mark-1 { stroke-dasharray: 7 3; } .mark-2 { stroke-dasharray: 9 3 2 3; }

.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(262px, 1fr)); gap: 16px; align-items: start;
}
article {
  position: relative; display: flex; flex-direction: column; overflow: hidden; border: 1px solid var(--line);
  border-radius: 8px; background: var(--raised);
}
article > * { margin: 0; padding: 0 14px; overflow-wrap: anywhere; }
article > :first-child:not(img) { padding-top: 14px; }
article img {
  display: block; width: 100%; height: 220px; padding: 0; object-fit: contain; background: var(--page);
  border-bottom: 1px solid var(--line);
}
.lost { color: var(--quiet); font-size: 0.8125rem; }
.context { white-space: pre-line; color: var(--quiet); font-size: 0.875rem; }
article > .context, article > details { margin-top: 10px; }
article details .context { margin: 6px 0 0; }
summary { cursor: pointer; }
article summary { color: var(--link); font-size: 0.875rem; }
.question { margin-top: 10px; font-weight: 600; white-space: pre-line; }
.choices { margin-top: 8px; list-style: none; font-size: 0.9375rem; }
.choices li { display: flex; gap: 8px; padding: 2px 8px; border-radius: 5px; }
.choices .right { background: var(--right); }
.choices .right::after { content: "\\2713"; margin-left: auto; color: var(--good); font-weight: 700; }
.letter { color: var(--quiet); }
.said { margin-top: 10px; }
.said div + div { margin-top: 8px; }
.said dt { color: var(--quiet); font-size: 0.8125rem; }
.said dd { margin: 0; white-space: pre-line; }
.score { color: var(--quiet); font-size: 0.8125rem; white-space: nowrap; }
.good { color: var(--good); font-weight: 700; } .bad { color: var(--bad); font-weight: 700; }
.by { margin-top: 12px; color: var(--quiet); font-size: 0.8125rem; }
.references { padding-left: 30px; color: var(--quiet); font-size: 0.875rem; line-height: 1.4; }
.references li { margin: 2px 0; }
.id { margin-top: auto; padding-top: 10px; padding-bottom: 12px; color: var(--quiet); font-size: 0.75rem; }

main > section > details { border-bottom: 1px solid var(--line); padding: 8px 0; }
.fields { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 8px 0; font-size: 0.875rem; }
.fields dt { color: var(--quiet); }
.fields dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }

@media (max-width: 640px) {
  header, main { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 24px; }
  h1 { font-size: 1.6rem; }
  h2 { margin-top: 40px; }
  table { font-size: 0.875rem; }
  tbody th { min-width: 140px; max-width: 150px; }
  th, td { padding: 7px 8px; }
  .cards {
    display: flex; gap: 12px; margin: 0 -16px; padding: 0 16px 8px; overflow-x: auto; scroll-snap-type: x mandatory;
    scroll-padding: 16px;
  }
  article { flex: 0 0 84%; scroll-snap-align: start; }
  .published .how { display: block; margin-left: 0; }
  .group { grid-template-columns: 1fr; gap: 2px; padding: 6px 0; }
  .label { text-align: left; }
  .label .how { display: inline; margin-left: 8px; }
  .fields { grid-template-columns: 1fr; gap: 0; }
  .fields dd { margin-bottom: 8px; }
}
@media print { .wide { overflow: visible; } nav { display: none; } article, .group { break-inside: avoid; } }
"""
