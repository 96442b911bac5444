#!/bin/sh
# Each peer into a virtual environment of its own, build/peers/NAME; what is there already is kept. A peer that does not
# install is reported and left out. Names as arguments install only those.
set -u
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}

# install NAME PYTHON MODULE PACKAGE...: the packages, then a check that the module can be imported
install() {
    name=$1 interpreter=$2 module=$3 folder=build/peers/$1
    shift 3
    [ -e "$folder/.done" ] && echo "$name: there already" && return
    if ! "$interpreter" -c '' 2>/dev/null; then
        echo "$name: skipped, it needs $interpreter"
        return
    fi
    if "$interpreter" -m venv "$folder" && "$folder/bin/pip" install -q "$@" && also "$name" "$folder" &&
        "$folder/bin/python" -c "import $module"; then
        touch "$folder/.done" && echo "$name: installed"
    else
        echo "$name: not installed"
    fi
}

# Orion pins a torchvision that it needs for data sets only; the worker stands in for it.
also() {
    [ "$1" != orion ] || "$2/bin/pip" install -q --no-deps orion_fhe==1.0.2
}

for peer in "${@:-all}"; do
    case $peer in openfhe | all)
        install openfhe "${PYTHON310:-python3.10}" openfhe numpy==2.2.6 openfhe==1.6.1.0.22.4 ;;
    esac
    case $peer in orion | all)
        install orion "$python" torch "numpy<2" PyYAML certifi h5py matplotlib "scipy<=1.14.1" tqdm torch ;;
    esac
    case $peer in desilo | all)
        install desilo "$python" desilofhe numpy desilofhe==2.0.0 ;;
    esac
    case $peer in helayers | all)
        install helayers "$python" pyhelayers numpy onnx pyhelayers==1.5.5.4 ;;
    esac
done
