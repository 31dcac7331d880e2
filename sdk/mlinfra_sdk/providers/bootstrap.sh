# Runs on the machine, under any POSIX sh: makes sure of an environment with the SDK, then becomes
# the process that starts the agent. The other side is bootstrap.py, which writes the values of
# version, digest, wheel, size, pins, home and python above this text. They talk in turns, over
# standard input and output: a line from here, then what it asks for. Nothing is done with root,
# nothing lies outside of $home but what uv and pip cache, and what fails leaves nothing behind.
set -u
umask 077

say() { printf '%s\n' "$*"; }

# fail WHAT [DETAIL]: the last words of the log say why, unless the disk is full: then even the log
# may be empty.
fail() {
  ! full || set -- disk
  say "fail $1 ${2-$(tail -n 8 "$work/log" 2>/dev/null | tr '\n\r\t' '   ' | tail -c 1500)}"
  exit 1
}

# Whether there is no room for another megabyte.
full() {
  [ -d "$work" ] || return 1
  head -c 1000000 /dev/zero 2>/dev/null >"$work/room"
  set -- $?
  rm -f "$work/room"
  [ "$1" != 0 ]
}

# Whether $1 is this user's, and nobody else can put anything into it: programs in it are run.
mine() {
  [ -O "$1" ] || return
  case $(ls -ldL "$1") in d????-??-*) ;; *) return 1 ;; esac
}

# Whether $1 is a Python of this version that can make environments.
fits() {
  "$1" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null
}

find_python() {
  for candidate in "$python" "python$version" python3 python \
    /usr/bin/python"$version" /usr/local/bin/python"$version" "$HOME"/.local/bin/python"$version" \
    "$HOME"/.pyenv/versions/"$version".*/bin/python /opt/conda/bin/python \
    "$HOME"/miniconda3/bin/python "$HOME"/anaconda3/bin/python "$HOME"/miniforge3/bin/python; do
    if [ -n "$candidate" ] && fits "$candidate"; then
      python=$candidate
      return
    fi
  done
  python=
}

find_uv() {
  for uv in uv "$home/bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
    "$uv" --version >/dev/null 2>&1 && return
  done
  uv=
}

# Without any Python that fits only uv can help: it brings its own.
fetch_uv() {
  url=https://astral.sh/uv/install.sh
  { curl -LsSf "$url" || wget -qO- "$url"; } 2>>"$work/log" >"$work/install.sh" &&
    UV_UNMANAGED_INSTALL="$home/bin" sh "$work/install.sh" >>"$work/log" 2>&1
  find_uv
}

# The packages from an index, by what is there; else whatever the other side can send. What lies on
# PYTHONPATH, which a job of Slurm has from its user, pip takes for installed; the SDK does not look
# there.
install() {
  printf '%s' "$pins" >"$work/pins"
  if [ -n "$uv" ]; then
    "$uv" pip install --quiet --python "$work/env/bin/python" --constraint "$work/pins" \
      "$work/$wheel" >"$work/log" 2>&1 && return
  elif "$python" -m pip --python "$work/env/bin/python" --version >/dev/null 2>&1; then
    PYTHONPATH='' "$python" -m pip --python "$work/env/bin/python" install --quiet --retries 1 \
      --constraint "$work/pins" "$work/$wheel" >"$work/log" 2>&1 && return
  fi
  ! full || fail disk
  say "packages $("$work/env/bin/python" -c 'import platform, sysconfig
print(sysconfig.get_platform(), "-".join(platform.libc_ver()))')"
  read -r size || exit 1
  head -c "$size" | "$work/env/bin/python" -c 'import sys, sysconfig, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as tree:
    tree.extractall(sysconfig.get_path("purelib"))' 2>"$work/log" || fail packages
}

build() {
  find "$home" -maxdepth 1 -name 'new.*' -mmin +120 -exec rm -rf {} + 2>/dev/null
  work=$(mktemp -d "$home/new.XXXXXX") || fail disk
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' HUP INT TERM PIPE
  export TMPDIR="$work"
  find_python
  find_uv
  [ -n "$python$uv" ] || fetch_uv
  [ -n "$python$uv" ] || fail python
  if [ -n "$uv" ]; then
    "$uv" venv --quiet --no-project --relocatable --python "${python:-$version}" "$work/env" \
      >"$work/log" 2>&1 || fail python
  else
    "$python" -m venv --without-pip "$work/env" >"$work/log" 2>&1 || fail python
  fi
  say wheel
  head -c "$size" >"$work/$wheel" 2>"$work/log" || fail disk
  install
  "$work/env/bin/python" -I -c 'import ipykernel.ipkernel, mlinfra_sdk.worker.agent' \
    >"$work/log" 2>&1 || fail start
  mkdir -p "$home/sdk" || fail disk
  # Another launch may have been quicker: what it has made is just as good, and in use by now.
  [ -x "$env/bin/python" ] || rm -rf "$env"
  "$work/env/bin/python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$work/env" "$env" \
    2>"$work/log" || [ -x "$env/bin/python" ] || fail disk
  rm -rf "$work"
}

work=/nonexistent
mkdir -p "$home" 2>/dev/null && [ -w "$home" ] || fail home "$home"
mine "$home" || fail others "$home"
env=$home/sdk/$digest
[ -x "$env/bin/python" ] || build
# Agents remove what was not used for long.
say "$version" 2>/dev/null >"$env/used"
say "ready $home"
exec "$env/bin/python" -I -m mlinfra_sdk.worker.host "$home" launch
