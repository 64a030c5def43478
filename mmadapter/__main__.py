import sys

from mmadapter.cli import main

sys.exit(main())
