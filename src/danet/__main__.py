from danet.cli import main

main()
