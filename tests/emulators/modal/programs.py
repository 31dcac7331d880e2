"""Programs of sandboxes that only look like the real ones."""

from __future__ import annotations

SMI = """#!/bin/sh
# A stand-in for nvidia-smi: recorded answers for the GPU that this sandbox was given.
case "$1" in
  --query-gpu=*) ;;
  *) echo "not recorded: $*" >&2; exit 2 ;;
esac
fields=$(echo "${{1#--query-gpu=}}" | tr , ' ')
i=0
while [ $i -lt {count} ]; do
  line=
  for field in $fields; do
    case $field in
      index) value=$i ;;
      name) value="{name}" ;;
      uuid) value="GPU-$i" ;;
      memory.total) case $* in *nounits*) value={memory} ;; *) value="{memory} MiB" ;; esac ;;
      driver_version) value=580.95.05 ;;
      *) value="[N/A]" ;;
    esac
    line="$line${{line:+, }}$value"
  done
  echo "$line"
  i=$((i+1))
done
"""
"""For the GPU that a sandbox was given: ``name``, ``memory`` (MiB) and ``count``."""

UV = """#!/bin/sh
# A stand-in for uv, because tests use no network: what is to be installed is here already, in the
# environment of the tests, except for wheels that are given as files.
case "$1 ${{2-}}" in
  "--version "*) echo "uv 0.0.0 (stand-in)" ;;
  "venv "*)
    for folder; do :; done
    {python} -m venv --without-pip "$folder" &&
      cp {image}/lib/python*/site-packages/packages.pth "$folder"/lib/python*/site-packages
    ;;
  "pip install")
    while [ $# -gt 0 ]; do
      case $1 in
        --python) python=$2; shift ;;
        *.whl)
          site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
          "$python" -m zipfile -e "$1" "$site" || exit ;;
      esac
      shift
    done ;;
  *) echo "not spoken: uv $*" >&2; exit 2 ;;
esac
"""
"""Its ``python`` is the image's."""
