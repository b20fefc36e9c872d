#!/bin/busybox sh
# Process 1 of softkvm's default guest: a shell on the first serial line or, where the host packed a command into the initramfs, that
# command with its streams on the other three lines. softkvm.cli.command is the host's side of the same protocol.
#
#   ttyS0  kernel log and the interactive console
#   ttyS1  the command's standard output; towards the guest, its standard input in blocks ("SIZE\n" and SIZE bytes; "0\n" at the end)
#   ttyS2  the command's standard error
#   ttyS3  from the guest only: "shell" says that the console is read from now on, "stdin" asks for the next block, "status N" is the end

command=/run/softkvm/command

/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /tmp
mount -t devpts devpts /dev/pts
hostname softkvm

# A serial line has no flow control that the kernel's buffers would obey, so the host sends a block only when the last one is consumed.
feed() {
    while echo stdin >&3 && read -r size && [ "$size" -gt 0 ]; do
        dd bs="$size" count=1 iflag=fullblock 2>/dev/null || return
    done
}

run_command() {
    exec 3>/dev/ttyS3 4<>/dev/ttyS1 5>/dev/ttyS2
    for line in 1 2 3; do
        stty -F /dev/ttyS$line 115200 raw -echo
    done
    mkfifo /run/softkvm/stdin
    feed <&4 >/run/softkvm/stdin &
    sh "$command" </run/softkvm/stdin >&4 2>&5 3>&- 4>&- 5>&-
    status=$?
    # Changing a line's settings waits until its output has left: nothing may be in flight when the host hears the status.
    stty -F /dev/ttyS1 raw -echo
    stty -F /dev/ttyS2 raw -echo
    echo "status $status" >&3
    stty -F /dev/ttyS3 raw -echo
}

run_shell() {
    cd /root || exit
    if [ -n "$SOFTKVM_ROWS" ]; then
        stty -F /dev/ttyS0 rows "$SOFTKVM_ROWS" columns "$SOFTKVM_COLUMNS"
    else
        # Nobody sits there. Without echo the shell leaves line editing to the kernel, so nothing that is sent early is lost.
        stty -F /dev/ttyS0 -echo
    fi
    unset SOFTKVM_ROWS SOFTKVM_COLUMNS
    echo shell >/dev/ttyS3
    setsid -c sh -l </dev/ttyS0 >/dev/ttyS0 2>&1
}

if [ -e "$command" ]; then
    run_command
else
    run_shell
fi
poweroff -f
