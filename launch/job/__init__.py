"""Many ranks as one job: started, heard, judged, restarted."""
