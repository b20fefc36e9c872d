# Runs in the guest; prints sections that test_boot.py reads, each behind a line "== NAME".
section() { echo "== $1"; }

section release; uname -r
section cpuinfo; cat /proc/cpuinfo
section clocksource; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
section meminfo; cat /proc/meminfo
section interrupts; cat /proc/interrupts
section cpus; nproc
section pci; ls /sys/bus/pci/devices
section ports; cat /proc/ioports
section cmdline; cat /proc/cmdline
section date; date +%s
section uptime; cut -d' ' -f1 /proc/uptime
sleep 0.3
section later; cut -d' ' -f1 /proc/uptime
section arithmetic; echo 'scale=20; 4*a(1)' | bc -l
section checksum; head -c 1000000 /dev/zero | sha256sum
section warnings; dmesg -r | grep "^<[0-4]>"  # KERN_WARNING and worse
section dmesg; dmesg
