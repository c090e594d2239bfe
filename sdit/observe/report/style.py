"""The page's style sheet: light and dark by the reader's preference, readable from 360 pixels on."""

CSS = """
:root{color-scheme:light dark;
--bg:#f6f7f9;--card:#fff;--text:#1b2330;--soft:#5b6676;--line:#e1e5eb;--grid:#eceff3;--accent:#2459c4;--chip:#eaf0fb;
--bad:#c0322b;--warn:#a16207;--good:#15803d;--hint:#fff7e0;
--c0:#2459c4;--c1:#d9700a;--c2:#0f8a5f;--c3:#b8328a;--c4:#7446c9;--c5:#0e8ba0;--c6:#8a5a2b;--c7:#64748b;
--p1:#f2b134;--p2:#c8413b;--p3:#2f6690;
--s0:#440154;--s1:#3b528b;--s2:#21918c;--s3:#4fae4a;--s4:#c9a90c}
@media (prefers-color-scheme:dark){:root{
--bg:#10141b;--card:#191f29;--text:#e6eaf0;--soft:#98a4b5;--line:#2a323f;--grid:#252d39;--accent:#7aa7ff;--chip:#1f2b42;
--bad:#ff7b72;--warn:#e3b341;--good:#56d38a;--hint:#2c2614;
--c0:#6ea0ff;--c1:#f6a04d;--c2:#45d19a;--c3:#f07cc0;--c4:#b394f5;--c5:#4fc9de;--c6:#cfa377;--c7:#9aa8ba;
--s0:#9d7bea;--s1:#6f9bf0;--s2:#35c3b4;--s3:#8fd85f;--s4:#f2d544}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
main,header>div{max-width:1240px;margin:0 auto;padding:0 24px}
header{background:var(--card);border-bottom:1px solid var(--line);padding:26px 0 18px}
.eyebrow{color:var(--soft);font-size:12.5px;letter-spacing:.06em;text-transform:uppercase;margin:0}
h1{font-size:27px;line-height:1.25;margin:2px 0 6px;font-weight:650;overflow-wrap:anywhere}
.sub{color:var(--soft);margin:0;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 8px;margin-top:14px}
nav a{color:var(--accent);background:var(--chip);text-decoration:none;border-radius:999px;padding:3px 12px;font-size:13.5px}
section{margin:34px 0}
h2{font-size:19px;font-weight:650;margin:0 0 12px;scroll-margin-top:12px}
h3{font-size:14.5px;font-weight:600;margin:0 0 10px;display:flex;flex-wrap:wrap;gap:4px 10px;align-items:baseline;
justify-content:space-between}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));margin-bottom:16px}
.wide{grid-template-columns:minmax(0,1fr)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;min-width:0}
.scroll+h3{margin-top:22px}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(142px,1fr));margin:0 0 14px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px;min-width:0}
.tile b{display:block;font-size:21px;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{color:var(--soft);font-size:13px}
.tile small{display:block;color:var(--soft);font-size:12.5px}
.run-name{display:flex;gap:8px;align-items:center;font-size:15.5px;font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
.dot{display:inline-flex;gap:6px;align-items:center;font-size:12.5px;font-weight:500;color:var(--soft);overflow-wrap:anywhere}
.dot i,.run-name i{width:10px;height:10px;border-radius:50%;display:inline-block;flex:none}
.badge{font-size:12px;font-weight:600;border-radius:999px;padding:1px 10px;border:1px solid currentColor;white-space:nowrap}
.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}.badge.warn{color:var(--warn)}.badge.plain{color:var(--soft)}
.hint{background:var(--hint);border:1px solid var(--line);border-left:4px solid var(--warn);border-radius:8px;padding:8px 14px;
margin:0 0 14px;overflow-wrap:anywhere}
.note,.empty{color:var(--soft);font-size:13px;margin:8px 0 0}
svg{display:block;width:100%;max-width:640px;height:auto;margin:0 auto}
svg text{font-size:13px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .label{fill:var(--text)}
.grid-line{stroke:var(--grid)}.axis{stroke:var(--soft);stroke-opacity:.6}.frame{fill:none;stroke:var(--line)}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:1;stroke-opacity:.28}
.mark{stroke-width:1.2;stroke-dasharray:2 3}
.pixels{image-rendering:pixelated}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 16px;margin:8px 0 0;padding:0;font-size:13px}
.legend li{display:flex;gap:6px;align-items:center;overflow-wrap:anywhere}
.legend i,.split i{width:11px;height:11px;border-radius:3px;display:inline-block;flex:none;margin-right:0}
.split i{margin-right:8px}
.scale{display:flex;gap:8px;align-items:center;justify-content:center;color:var(--soft);font-size:12.5px;margin-top:6px}
.scale b{width:150px;max-width:40%;height:10px;border-radius:5px}
.bar{display:flex;height:26px;border-radius:7px;overflow:hidden;background:var(--grid);margin-bottom:10px}
.bar span{min-width:0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;font-size:12.5px;white-space:nowrap}
tr:last-child td{border-bottom:0}
td{overflow-wrap:anywhere;min-width:64px}
.split td:nth-child(n+2){text-align:right;white-space:nowrap;padding-right:0;padding-left:12px}
.keys td:first-child{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:12.5px;
color:var(--soft)}
.keys td:nth-child(n+2){font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:12.5px}
.set{color:var(--accent);font-weight:600}.same{color:var(--soft)}
details{margin-top:10px}summary{cursor:pointer;color:var(--accent);font-size:13.5px}
.frames{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(46%,165px),1fr))}
.frames.big{grid-template-columns:repeat(auto-fill,minmax(min(46%,165px),1fr))}
figure{margin:0;min-width:0}
figure img{display:block;width:100%;border-radius:6px;border:1px solid var(--line)}
figure img.map{aspect-ratio:1;image-rendering:pixelated}
figure img.map+img.map{margin-top:6px}
figcaption{color:var(--soft);font-size:12.5px;margin-top:4px}
.ranks{display:flex;flex-wrap:wrap;gap:10px;margin-bottom:12px}
.group{border:1px dashed var(--soft);border-radius:10px;padding:8px 10px}
.group>span{font-size:12px;color:var(--soft)}
.group div{display:flex;flex-wrap:wrap;gap:6px;margin-top:4px}
.group b{background:var(--chip);border-radius:7px;padding:4px 10px;font-size:13px;font-weight:600}
footer{color:var(--soft);font-size:13px;margin:40px auto 30px;max-width:1240px;padding:0 24px}
@media (max-width:640px){main,header>div,footer{padding:0 14px}.card{padding:13px 13px}svg text{font-size:14px}
h1{font-size:22px}section{margin:26px 0}.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.tile b{font-size:19px}.grid{gap:12px}th,td{padding-right:10px}}
@media (min-width:900px){.two{grid-template-columns:repeat(2,minmax(0,1fr))}.two svg text{font-size:10px}.two svg{max-width:none}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}nav{display:none}}
"""
