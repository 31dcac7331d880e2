"""AMD's GPUs by the real package ``amdsmi``, above a library that answers as one recorded GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ANSWERS = r"""
#include <stdint.h>
#include <string.h>
int amdsmi_init(uint64_t flags) { return 0; }
int amdsmi_get_socket_handles(uint32_t *count, void **out) {
    *count = 1;
    if (out) out[0] = (void *)1;
    return 0;
}
int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **out) {
    *count = 1;
    if (out) out[0] = (void *)2;
    return 0;
}
int amdsmi_get_gpu_asic_info(void *gpu, char *out) { strcpy(out, "AMD Instinct MI300X"); return 0; }
int amdsmi_get_gpu_vram_usage(void *gpu, uint32_t *out) {
    out[0] = 196592, out[1] = 2048;
    return 0;
}
int amdsmi_get_gpu_activity(void *gpu, uint32_t *out) { out[0] = 93; out[1] = 0xFFFF; return 0; }
int amdsmi_get_power_info(void *gpu, uint32_t *out) { out[2] = 0xFFFF; out[3] = 512; return 0; }
int amdsmi_get_temp_metric(void *gpu, int sensor, int metric, int64_t *out) {
    if (sensor == 0) { *out = 61; return 0; }
    return 2; /* this one has no such sensor */
}
"""
READ = """
import json, msgspec, sys
from mlinfra_sdk.worker import amd
print(json.dumps(msgspec.to_builtins(amd.read())), "amdsmi" in sys.modules)
"""


def read(**environment: str) -> str:
    env = {**os.environ, **environment}
    return subprocess.check_output([sys.executable, "-c", READ], env=env, text=True)


def test_a_gpu_is_read(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("amdsmi")
    assert spec is not None and spec.origin is not None
    wrapper = Path(spec.origin).with_name("amdsmi_wrapper.py").read_text()
    names = set(re.findall(r"_libraries\['libamd_smi.so'\]\.(\w+)", wrapper))
    known = set(re.findall(r"^int (\w+)\(", ANSWERS, re.M))
    assert known <= names
    rest = "".join(f"int {name}(void) {{ return 2; }}\n" for name in sorted(names - known))
    (tmp_path / "lib").mkdir()
    (tmp_path / "smi.c").write_text(ANSWERS + rest)
    library = tmp_path / "lib" / "libamd_smi.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "smi.c"], check=True)
    found, _, imported = read(ROCM_PATH=str(tmp_path)).rpartition(" ")
    assert imported.strip() == "True"
    assert json.loads(found) == [
        {
            "name": "AMD Instinct MI300X",
            "busy": 93.0,
            "used": 2048 << 20,
            "total": 196592 << 20,
            "watts": 512.0,
            "celsius": 61.0,
        }
    ]


@pytest.mark.parametrize("broken", [False, True])
def test_without_rocm_nothing_is_imported(tmp_path: Path, broken: bool) -> None:
    if broken:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libamd_smi.so").write_text("no library")
    environment = {"ROCM_PATH": str(tmp_path)} if broken else {}
    assert read(**environment).splitlines()[-1] == "[] False"
