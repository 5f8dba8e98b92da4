#!/bin/sh
# Makes verdict.png, the picture in the README, with glm-core, pip and chromium on the PATH: plants one
# fault in a new backend (GELU's tanh form for its erf form), runs it beside `cpu`, takes the report's
# table and two charts. About three minutes on two busy cores.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
cd "$work"
glm-core backend new acme
erf='torch.erf(x \* 0.5\*\*0.5)'
tanh='torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))'
sed -i "s|$erf|$tanh|" glm-core-acme/glm_core_acme/__init__.py
grep -q "0.044715" glm-core-acme/glm_core_acme/__init__.py
python -m pip install -q --no-deps --no-build-isolation --target site ./glm-core-acme
python -c 'import pydoc_data.topics as t; print(*list(t.topics.values())[:40])' >text.txt
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
cp "$here/verdict.toml" .
# exits with 1: acme diverges
glm-core align run --config verdict.toml --backends acme,cpu --dtypes float32 --out run || test $? = 1
python "$here/verdict.py" run/report.html page.html
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1.5 \
  --window-size=1000,520 --screenshot="$here/verdict.png" "file://$work/page.html"
rm -r "$work"
