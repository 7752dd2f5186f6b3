"""Which versions of C4 a TFDS folder holds: a user has prepared one of many, and names none."""

import os
import re

from qmoe_jax.calibration import text_packages
from qmoe_jax.checkpoints.storage import check_reachable
from qmoe_jax.errors import TokensError
from qmoe_jax.paths import expanded

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)/?")
_INFO = "dataset_info.json"  # written last


def tfds_folder(data_dir: str | None) -> str:
    """Return the TFDS folder that is meant, local or gs://; None is that of TFDS.

    Raises:
      TokensError: an empty path, or one that is neither local nor a URL.
    """
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return expanded(data_dir if data_dir is not None else default, "data_dir", TokensError)


def prepared_versions(data_dir: str | None, config: str = "en") -> list[str]:
    """List the versions of a configuration of C4 that are prepared, the newest first.

    Args:
      data_dir: the TFDS folder that has `c4/<config>/<version>`; None is TFDS's default.
      config: of C4.

    Raises:
      TokensError: the folder cannot be listed.
    """
    check_reachable(tfds_folder(data_dir))
    tf = text_packages.tensorflow()
    folder = os.path.join(tfds_folder(data_dir), "c4", config)
    try:
        names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
        matches = [match for name in names if (match := _VERSION.fullmatch(name))]
        numbers = [tuple(map(int, match.groups())) for match in matches]
        versions = [".".join(map(str, number)) for number in sorted(numbers, reverse=True)]
        return [v for v in versions if tf.io.gfile.exists(os.path.join(folder, v, _INFO))]
    except tf.errors.OpError as error:
        raise TokensError(f"data_dir: {folder} cannot be listed: {error.message}") from error


def choose_version(version: str | None, data_dir: str | None, config: str = "en") -> str:
    """Return a version that is prepared.

    Args:
      version: that is asked for; None is the newest.
      data_dir: see `prepared_versions`.
      config: of C4.

    Raises:
      TokensError: it is not prepared, or none is; the message lists those that are.
    """
    prepared = prepared_versions(data_dir, config)
    if version in prepared:
        return version
    if version is None and prepared:
        return prepared[0]
    named = f"c4/{config}" + ("" if version is None else f":{version}")
    where = tfds_folder(data_dir)
    if prepared:
        raise TokensError(
            f"TFDS has no prepared {named} under {where}; prepared are {', '.join(prepared)}: take "
            "one of these"
        )
    raise TokensError(
        f"TFDS has no prepared {named} under {where}; give the folder that holds "
        f"c4/{config}/{version or '<version>'}, or use the released JSON lines."
    )
