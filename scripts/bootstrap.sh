#!/bin/sh
# Makes the virtual environment $1 with everything in it: by uv where it is there or can be installed, else by venv and pip.
set -eu
venv="$1"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lighten needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 2
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "python -m venv failed. On Debian or Ubuntu: apt install python3-venv" >&2
    exit 2
}

if command -v uv >/dev/null 2>&1; then
    uv=uv
elif "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
    uv="$venv/bin/uv"
else
    uv=""
fi

echo "installing into $venv (a few GB of PyTorch the first time)"
if [ -n "$uv" ]; then
    VIRTUAL_ENV="$venv" "$uv" pip install --quiet --python "$venv/bin/python" --constraints constraints.txt --editable '.[dev]'
else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
fi
