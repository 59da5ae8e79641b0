# Runs README's first two code blocks (the set-up on a fresh machine) exactly as printed there.
# Called by .ci/run in a fresh virtual environment and a clean clone.
for block in 1 2; do
  commands=$(awk -v n="$block" '/^```bash$/ {b++; inside = (b == n); next} /^```$/ {inside = 0} inside' README.md)
  [ -n "$commands" ] || { echo "README.md has no bash block number $block" >&2; exit 1; }
  printf '+ %s\n' "$commands"
  bash -euo pipefail -c "$commands"
done
