#!/usr/bin/env bash
# Runs one node's share of a job on several nodes, without Slurm. Start it on every node:
#
#   bash launch/many_nodes.sh static HEAD:PORT NODES NODE_RANK [options] COMMAND --config FILE key=value...
#   bash launch/many_nodes.sh c10d   HEAD:PORT NODES           [options] COMMAND --config FILE key=value...
#
# static: you number the nodes, and HEAD is the one with NODE_RANK 0. c10d: the nodes are numbered as they
# come, and HEAD is any one of them. All nodes see the same files at the same paths. Over ssh, for instance:
#
#   hosts=(node1 node2)
#   for i in "${!hosts[@]}"; do
#     ssh "${hosts[i]}" "cd $PWD && bash launch/many_nodes.sh static ${hosts[0]}:29500 ${#hosts[@]} $i sft ..." &
#   done; wait
set -euo pipefail

usage() {
  echo "launch: $1" >&2
  sed -n '4,5s/^# *//p' "$0" >&2
  exit 2
}

(($# >= 4)) || usage "too few arguments"
backend=$1 endpoint=$2 nodes=$3
shift 3
[[ $endpoint =~ ^[^:]+:[0-9]+$ ]] || usage "'$endpoint' is not HOST:PORT"
[[ $nodes =~ ^[0-9]+$ ]] || usage "'$nodes' is not a number of nodes"
case $backend in
static)
  [[ $1 =~ ^[0-9]+$ ]] || usage "'$1' is not a node rank, 0 to $((nodes - 1))"
  rendezvous=(--node-rank "$1" --master-addr "${endpoint%:*}" --master-port "${endpoint##*:}")
  shift
  ;;
c10d) rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$endpoint") ;;
*) usage "'$backend' is neither static nor c10d" ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/node.sh" --nnodes "$nodes" "${rendezvous[@]}" "$@"
