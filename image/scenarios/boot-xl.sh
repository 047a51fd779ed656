# The tests' third machine: the backend in a storage domain, and xl itself attaches the disks.
. /scenario/config
DOMAIN=storage
. /scenario/harness.sh
. /scenario/tests.sh
. /scenario/xl.sh

storage_up storage && backend_up "$FLAVOUR" storage || { echo "@fail xl: the storage domain did not come up"; exit 1; }
on storage "echo '--kind vbd --kind qdisk --root /srv/images' >/etc/vbdd/arguments"
vbdd_stop storage && vbdd_start storage || { echo "@fail xl: vbdd did not start for two kinds"; exit 1; }
story "xl: the storage domain serves vbd and qdisk"
KEEP=x1
scenario "xl create with backend=, backendtype phy and qdisk" test_xl_create
scenario "xl block-attach, block-list and block-detach" test_xl_hot
scenario "xl block-detach under I/O, polite and forced" test_xl_detach_io
scenario "xl save and restore under I/O" test_xl_save
scenario "xl save -c: suspend and go on in place" test_xl_checkpoint
scenario "xl destroy under I/O" test_xl_destroy
scenario "xl devd beside vbdd" test_xl_devd
scenario "xl destroy under I/O, with xl devd" test_xl_destroy
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
