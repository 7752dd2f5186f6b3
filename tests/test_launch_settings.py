"""The file of launch settings: which entry counts, and damage."""

import json

import pytest

from qmoe_jax.ops.cuda import launch_settings


class TestLaunchSettings:
    def test_the_shipped_file_is_read(self):
        content = json.loads(launch_settings.settings_path().read_text())
        for codings in content["devices"].values():
            for fields in codings.values():
                launch_settings.settings_from_json(fields)

    def test_which_entry_counts(self, tmp_path, monkeypatch):
        path = tmp_path / "kernel_launch.json"
        monkeypatch.setattr(launch_settings, "settings_path", lambda: path)
        assert (
            launch_settings.launch_settings("a", "9.0", "qmoe") == launch_settings.LaunchSettings()
        )
        for place, name in enumerate(("default", "compute capability 9.0", "a")):
            chosen = launch_settings.LaunchSettings(few_tokens=10 + place)
            launch_settings.write_settings(name, {"tunstall": chosen}, path)
            assert launch_settings.launch_settings("a", "9.0", "tunstall") == chosen
        assert launch_settings.launch_settings("b", "9.0", "tunstall").few_tokens == 11
        assert launch_settings.launch_settings("b", "8.0", "tunstall").few_tokens == 10
        assert (
            launch_settings.launch_settings("a", "9.0", "qmoe") == launch_settings.LaunchSettings()
        )
        assert list(tmp_path.iterdir()) == [path]

    def test_tensor_cores_from_where_the_coding_says(self):
        found = {c: launch_settings.default_settings(c) for c in ("tunstall", "lattice", "qmoe")}
        assert found["qmoe"] == launch_settings.LaunchSettings()
        assert found["tunstall"].matmul_tokens_per_expert == 16
        assert found["lattice"].matmul_tokens_per_expert == 4
        assert launch_settings.launch_settings("none", "9.9", "lattice") == found["lattice"]

    @pytest.mark.parametrize(
        "text",
        [
            "[]",
            "{",
            '{"devices": {"a": {"qmoe": {"other": 1}}}}',
            '{"devices": {"a": {"qmoe": {"few": {"threads": 33, "rows_per_block": 1}}}}}',
        ],
    )
    def test_damage_is_named(self, tmp_path, monkeypatch, text):
        path = tmp_path / "kernel_launch.json"
        path.write_text(text)
        monkeypatch.setattr(launch_settings, "settings_path", lambda: path)
        with pytest.raises(ValueError, match="kernel_launch.json is not as it should be"):
            launch_settings.launch_settings("a", "9.0", "qmoe")
        launch_settings._read.cache_clear()
