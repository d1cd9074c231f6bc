"""A system of files that is nobody's: its boot menu, and what may be run on it."""

import shutil
import subprocess

from reboot_sim import HOME

from kvmnest.bisect.reboot.commands import CommandFailed, Commands

OTHER = "6.12.0-rc1-kvmnest-0123456789ab"
# As grub-mkconfig of GRUB 2.06 lays it out, with what a parser could trip over.
MENU = """
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
  fi
}
menuentry 'It'\\''s Linux' --class os $menuentry_id_option 'gnulinux-simple-U' {
	linux	/vmlinuz-NEW root=UUID=U ro quiet
	initrd	/initrd.img-NEW
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-U' {
	menuentry 'Linux NEW (recovery mode)' $menuentry_id_option 'gnulinux-NEW-recovery-U' {
		linux	/boot/vmlinuz-NEW root=UUID=U ro single
	}
	menuentry 'Linux NEW' --class os $menuentry_id_option 'gnulinux-NEW-advanced-U' {
		if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
		linux	/boot/vmlinuz-NEW root=UUID=U ro quiet
	}
	menuentry 'Linux HOME' --class os $menuentry_id_option 'gnulinux-HOME-advanced-U' {
		linux	/boot/vmlinuz-HOME root=UUID=U ro quiet
	}
}
menuentry 'Memory test' { linux16 /boot/memtest86+.bin
}
""".replace("NEW", OTHER).replace("HOME", HOME)

_MAKE_MENU = """
mount --bind "$1/boot" /boot
mount --bind "$1/etc/default/grub.d" /etc/default/grub.d
exec grub-mkconfig -o /boot/grub/grub.cfg
"""


class Scratch(Commands):
    """GRUB's own tools run, on the scratch root; what would change this system is only noted."""

    def __init__(self, root):
        self.root = root
        self.ran = []
        self.fails = {}

    def run(self, *words):
        self.ran.append(" ".join(words))
        failing = next((text for name, text in self.fails.items() if name in words), None)
        if failing is not None:
            raise CommandFailed(f"{words[0]} failed: {failing}", failing)
        if words[0] == "update-grub":
            # In a mount namespace of its own /boot is the scratch one, for this command alone.
            return super().run("unshare", "-m", "sh", "-ec", _MAKE_MENU, "sh", str(self.root))
        return super().run(*words) if words[0].startswith("grub-") else ""


def make_root(tmp_path):
    """A machine that does, at ``tmp_path``."""
    for folder in ("boot/grub", "etc/default/grub.d", "etc/systemd/system", "lib/modules"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run/systemd/system", "proc/sys/kernel/random", "sys/module/kvm_intel"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "boot/grub/grub.cfg").write_text(MENU)
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: fpu vmx est\n")
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("1-2-3\n")
    (tmp_path / "sys/module/kvm_intel/refcnt").write_text("0\n")
    if shutil.which("grub-editenv"):
        subprocess.run(["grub-editenv", tmp_path / "boot/grub/grubenv", "create"], check=True)
    return tmp_path
