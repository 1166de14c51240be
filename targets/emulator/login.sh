# Runs a command in a board's system as if logged in there. Everything it sets up (the handler of foreign programs,
# mounts, processes, the name) is in namespaces of its own, made by `unshare`; the host sees none of it.
# Arguments: base, board's files, home, emulator, machine, processor, kernel, name, command.
set -eu
base=$1 board=$2 home=$3 emulator=$4 machine=$5 cpu=$6 kernel=$7 name=$8 command=$9

refused() {
    echo "This kernel does not let a user $1, so nobody can log in to the emulated board: it takes Linux 6.7 or newer," \
        "and user namespaces that are not forbidden (kernel.unprivileged_userns_clone," \
        "kernel.apparmor_restrict_unprivileged_userns)." >&2
    exit 126
}

case $machine in
aarch64) code='\xb7\x00' ;;
x86_64) code='\x3e\x00' ;;
esac
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null || refused "have a binfmt_misc of its own"
# F: the emulator is opened now, since the board's root does not hold it.
elf='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff'
printf '%s' ":$machine:M::$elf\\x02\\x00$code:$mask\\xfe\\xff\\xff\\xff:$emulator:F" \
    >/proc/sys/fs/binfmt_misc/register || refused "register an emulator"

mount --bind "$base" "$base"
mount -o remount,bind,ro "$base" 2>/dev/null || true # a safeguard only: some file systems cannot be bound anew
mount -t proc proc "$base/proc"
mount --bind "$board/proc/cpuinfo" "$base/proc/cpuinfo"
mount --bind "$board/sys" "$base/sys"
mount --rbind /dev "$base/dev"
mount --bind "$home/root" "$base/root"
mount --bind "$home/tmp" "$base/tmp"
hostname "$name" 2>/dev/null || true
cd /
exec env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8 \
    QEMU_CPU="$cpu" QEMU_UNAME="$kernel" TIGHTFIT_EMULATED=1 ${SSH_CONNECTION:+SSH_CONNECTION="$SSH_CONNECTION"} \
    chroot "$base" /bin/bash -c "cd /root; $command"
