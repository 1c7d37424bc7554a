"""Commands in mount and network namespaces of their own, as any user may have on most machines."""

import subprocess

import pytest

ISOLATED = ("unshare", "--user", "--map-root-user", "--net", "--mount")
NO_NAMESPACES = "this machine forbids namespaces"


def _allowed() -> bool:
    mount = "mount -t tmpfs none /mnt && ip link add danet type bridge"
    try:
        done = subprocess.run([*ISOLATED, "sh", "-c", mount], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


needs_namespaces = pytest.mark.skipif(not _allowed(), reason=NO_NAMESPACES)
