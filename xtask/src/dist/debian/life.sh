# The package's life in a running Debian: what dpkg and systemd make of /root/first.deb and /root/second.deb. Every claim is
# a line; the last says that all held.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

claim() {
    what=$1
    shift
    if said=$("$@" 2>&1); then
        echo "$what"
    else
        echo "FAILED: $what: $said"
        journalctl --boot --unit=scanside.service --lines=20 --no-pager
        systemctl exit
        exit 1
    fi
}
silent() { said=$("$@" 2>&1) && [ -z "$said" ] || { echo "$said"; return 1; }; }
active() { [ "$(systemctl is-active scanside.service)" = active ]; }
inactive() { ! active; }
pid() { systemctl show --property=MainPID --value scanside.service; }
everything() {
    find / -xdev \( -path /root -o -path /var/log -o -path /var/cache -o -path /var/tmp -o -path /var/lib/dpkg -o -path /var/lib/systemd \) -prune -o -print |
        sort
}
report() { scanside watch --socket /run/scanside/scanside.sock --count 1 --timeout 120 --json >/root/report.json; }
send() { scanside send /root/study/dicom --dicom 127.0.0.1:11112; }
restarted() { active && [ "$(pid)" != "$before" ]; }
version() { [ "$(dpkg-query --show --showformat='${Version}' scanside)" = "$1" ]; }

settings=/etc/scanside/scanside.toml
everything >/root/before

claim "it installs" dpkg --install /root/first.deb
claim "and runs at once, as its unit shuts it in" active
claim "also after the next boot" systemctl --quiet is-enabled scanside.service
claim "systemd finds nothing to say about its units" silent systemd-analyze verify scanside.service scanside-usb@sda1.service
claim "its files are as they were packed" silent dpkg --verify scanside
claim "a study is taken" send
claim "and its report comes" report
grep -q '"status":"complete"' /root/report.json || claim "which is complete" cat /root/report.json /root/none

echo "# set on the spot" >>$settings
before=$(pid)
claim "it upgrades" dpkg --install /root/second.deb
claim "to the new version" version 0.2.0
claim "which runs in the old one's place" restarted
claim "with the settings of the spot" grep -q "# set on the spot" $settings
claim "and its spool" test -d /var/lib/scanside/spool

claim "switched off" systemctl --quiet disable --now scanside.service
claim "it stays so" inactive
claim "when it is installed again" dpkg --install /root/second.deb
claim "at the next boot too" sh -c '! systemctl --quiet is-enabled scanside.service'
claim "and is switched on again" systemctl --quiet enable --now scanside.service

claim "it is removed" dpkg --remove scanside
claim "and stops" inactive
claim "its program is gone" test ! -e /usr/lib/scanside
claim "its settings stay" grep -q "# set on the spot" $settings
claim "and so does what it holds" test -d /var/lib/scanside/spool

claim "it is put back" dpkg --install /root/second.deb
claim "and runs" active
claim "it is purged" dpkg --purge scanside
claim "and stops for good" inactive
everything >/root/after
claim "of its files nothing is left" diff /root/before /root/after
echo "all of it holds"
systemctl exit
