"""What every other folder uses: errors, files written whole or not at all, devices, safe pickles, the console.

Imports nothing of this project.
"""
