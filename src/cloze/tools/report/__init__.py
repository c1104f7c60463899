"""`cloze report`: write one HTML file about one run or several.

    RUN/*.json, config.yaml, metrics.jsonl --> gather --> curves --> page --> report.html
                                                  \\--> sections, scores --/

No torch, no network, nothing unpickled; only `examples`, which fills masks, loads models. page.html, style.css and
charts.js become part of the file.
"""
