"""Models on disk: Hugging Face folders and converted folders, loaded, written and converted.

load.py          any folder into a model; a run's start from one
start_config.py  the config of a run that starts from a checkpoint; published.py knows some models
hub.py           a folder by its name, or from the Hugging Face Hub
companions.py    tokenizer, chat template and generation config, copied along
hf_config.py     config.json, both ways
hf_weights.py    tensor names, both ways
safetensors_io.py, orbax_folder.py    tensors, piece by piece; orbax_layout.py checks a folder
export.py        a model in memory into a Hugging Face folder
source.py, convert.py    one folder into another, block by block
calibration.py   fast weights that gain on a text without training
model_changes.py what a run may change about the model that it starts from
"""
