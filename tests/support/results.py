"""What every results.json of an evaluation begins with."""


def results_head(name, **options):
    return {
        "model": name,
        "dtype": "float32",
        "options": options,
        "date": "d",
        "commit": None,
        "seconds": 1.5,
        "hardware": {"device_count": 1, "device": "cpu", "cpus": 2},
        "versions": {"jax": "1"},
    }
