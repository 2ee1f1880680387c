"""``--trust``: files that only running them can open are converted in the sandbox to files that are read as data.

* ``converting`` knows the kinds of such files by their content, and has each converted;
* ``apart`` is the sandbox of the conversions: no network, no files but those of programs, more time and memory;
* ``pytorch``, ``keras`` and ``tensorflow`` run in there, and meet the file;
* ``loader`` reads what they return, and writes repaired weights into a copy of that.

What a conversion returns is bytes, parsed as those of any file. They need not be the network that the file holds: code
that runs can return another. That is what the user trusts its author for.
"""
