"""Read files that this process did not write: the only code that opens or parses them.

Such a file may be cut short, be of another program, or be made by a stranger to do harm. So every reader has limits
(bytes, depth, counts), reads regular files only, follows no link that leaves its folder, runs no code, and raises a
ClozeError of one line.

    paths               plain names, regular files, no links
    folders             which tool wrote a checkpoint folder
    json_yaml           JSON and YAML, read and written
    safetensors_header  names, types and shapes of the tensors in a file
    arrow_batches       Arrow and Parquet, validated, in batches of bounded size once decoded
    text_lines          text of any encoding with a mark, and any line ends
    pickles             pickles and torch.save files, without the code in them
    pretrained          models, configurations and tokenizers, loaded by transformers
"""
