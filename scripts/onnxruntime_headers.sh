#!/bin/sh
# Fetches ONNX Runtime's C and C++ headers into the folder $1, from Debian's or Ubuntu's package libonnxruntime-dev: of this
# machine's own release where that has it, else of a newer one from the same mirror. Needs no root; whole or not at all.
set -eu

fail() {
    echo "onnxruntime_headers: $1" >&2
    exit 1
}

[ $# -eq 1 ] && [ -n "$1" ] || {
    echo "usage: $0 FOLDER" >&2
    exit 2
}
folder="${1%/}"
[ ! -f "$folder/onnxruntime_cxx_api.h" ] || exit 0
[ ! -e "$folder" ] || fail "$folder is there and holds no headers of ONNX Runtime; name another folder"
for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null || fail "$tool is missing: this needs Debian or Ubuntu; elsewhere take the headers of ONNX Runtime's release archive"
done

mkdir -p "$(dirname "$folder")" 2>/dev/null || fail "no folder can be made in $(dirname "$folder")"
room="$(mktemp -d "$(dirname "$folder")/.headers.XXXXXX" 2>/dev/null)" || fail "$(dirname "$folder") cannot be written"
trap 'rm -rf "$room"' EXIT
trap 'exit 130' INT TERM
work="$(cd "$room" && pwd)"

# download RELEASE APT-OPTIONS...: a release of "" is whatever this machine has
download() {
    release="$1"
    shift
    (cd "$work" && apt-get "$@" -qq download "libonnxruntime-dev${release:+/$release}" >said.txt 2>&1)
}

# newer RELEASE COMPONENT ADDRESS: the package of another release of a mirror, with lists of our own
newer() {
    mkdir -p "$work/$1/state/lists/partial" "$work/$1/cache/archives/partial"
    echo "deb $signed$3 $1 $2" >"$work/$1/sources.list"
    set -- "$1" -o "Dir::Etc::sourcelist=$work/$1/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State=$work/$1/state" \
        -o "Dir::Cache=$work/$1/cache" -o "Dir::State::status=$status" -o Acquire::Languages=none \
        -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any
    release="$1"
    shift
    apt-get "$@" -qq update >"$work/said.txt" 2>&1 && download "$release" "$@"
}

status=/var/lib/dpkg/status
if ! download ""; then
    mirror="$(apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk '($1 == "Debian" && $2 == "main" || $1 == "Ubuntu" && $2 == "universe") && $3 !~ /security/ { print; exit }')"
    [ -n "$mirror" ] || fail "apt knows no Debian or Ubuntu mirror yet: run apt-get update once"
    # shellcheck disable=SC2086
    set -- $mirror
    case "$1" in
    Debian) releases="trixie sid" keyring=/usr/share/keyrings/debian-archive-keyring.gpg ;;
    *) releases="devel" keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg ;;
    esac
    signed=""
    [ ! -r "$keyring" ] || signed="[signed-by=$keyring] "
    found=""
    for release in $releases; do
        if newer "$release" "$2" "$3"; then
            found="$release"
            break
        fi
    done
    [ -n "$found" ] || fail "libonnxruntime-dev cannot be had from the mirror ($(grep '^[EW]: ' "$work/said.txt" | head -n 1))"
fi

dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/package" || fail "the package is damaged"
header="$(find "$work/package" -name onnxruntime_cxx_api.h | head -n 1)"
[ -n "$header" ] || fail "libonnxruntime-dev holds no onnxruntime_cxx_api.h"
mv -T "$(dirname "$header")" "$folder" 2>/dev/null || [ -f "$folder/onnxruntime_cxx_api.h" ] || fail "$folder cannot be written"
echo "$folder"
