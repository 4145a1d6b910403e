#!/usr/bin/env bash
# Two hosts on one machine (as root): namespaces with a network address, a name and a /tmp of their own.
#   hosts.sh up | hosts.sh 1 COMMAND ... | hosts.sh 2 COMMAND ... | hosts.sh down
# Ray:      hosts.sh 1 ray start --head --node-ip-address=10.77.0.1 --port=6379 --num-cpus=2
#           hosts.sh 2 ray start --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=2
#           hosts.sh 1 lavit-tok shards DATASET --out DIR --engine ray --address 10.77.0.1:6379 --workers 2
# torchrun: hosts.sh 1 env NODES=2 NODE=0 HEAD=10.77.0.1 GPUS=1 GLOO_SOCKET_IFNAME=link1 examples/cluster/torchrun.sh ...
#           hosts.sh 2 env NODES=2 NODE=1 HEAD=10.77.0.1 GPUS=1 GLOO_SOCKET_IFNAME=link2 examples/cluster/torchrun.sh ...
set -euo pipefail
case "$1" in
up)
    ip link add link1 type veth peer name link2
    for i in 1 2; do
        ip netns add "host$i"
        ip link set "link$i" netns "host$i"
        ip -n "host$i" address add "10.77.0.$i/24" dev "link$i"
        ip -n "host$i" link set "link$i" up
        ip -n "host$i" link set lo up
        mkdir -p "/var/tmp/host$i"
    done
    printf '%s\n' '127.0.0.1 localhost' '10.77.0.1 host1' '10.77.0.2 host2' > /var/tmp/hosts
    ;;
down)
    for i in 1 2; do ip netns delete "host$i"; done
    ;;
*)
    host=$1
    shift
    exec ip netns exec "host$host" unshare --mount --uts bash -c '
        mount --bind "/var/tmp/$0" /tmp && mount --bind /var/tmp/hosts /etc/hosts && hostname "$0" &&
        exec "$@"' "host$host" "$@"
    ;;
esac
